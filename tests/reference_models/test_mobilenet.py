"""MobileNetV2: parity with torchvision and timm, frozen statistics that stay, real pictures told apart."""

import json

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from minilora import count_parameters
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from tests.support.parity import assert_parity
from tests.support.text_parity import randomize, surviving_mutants, write_checkpoint

WEIGHTS = "mobilenet_v2_features.safetensors"


def oracle(library: str) -> nn.Module:
    if library == "timm":
        return randomize(timm.create_model("mobilenetv2_100", num_classes=7))
    return randomize(torchvision.models.mobilenet_v2(num_classes=7))


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_equals_the_library_and_round_trips(library, images, tmp_path):
    theirs = oracle(library)
    ours = load_pretrained("mobilenet-v2", write_checkpoint(tmp_path / "a", theirs.state_dict())).eval()

    def their_answers(model, images):
        features = model.forward_features(images) if library == "timm" else model.features(images)
        return model(images), features.flatten(2).transpose(1, 2), features.mean((2, 3))

    def our_answers(model, images):
        return model(images), model.forward_features(images), model.pooled(images)

    assert_parity(ours, theirs, images, ask=our_answers, ask_theirs=their_answers)
    save_pretrained(ours, tmp_path / "b", library)
    back = load_pretrained(tmp_path / "b")
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in ours.state_dict().items())
    from safetensors.torch import load_file

    fresh = oracle(library)
    fresh.load_state_dict(load_file(tmp_path / "b" / "model.safetensors"))  # strict
    with torch.no_grad():
        assert torch.equal(fresh(images), theirs(images))


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_swaps_in_the_key_table_break_parity(layout, tmp_path):
    theirs = oracle(layout)
    write_checkpoint(tmp_path, theirs.state_dict())
    ours = load_pretrained("mobilenet-v2", tmp_path).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    small = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ours(small)
    table = ours.key_table(layout)
    assert surviving_mutants(ours, state, table, lambda m: m(small), expected, count=60) == []


def test_frozen_statistics_do_not_move_in_train_mode_and_trained_ones_do(images):
    model = create_model("mobilenet-v2", num_classes=3, width=0.25)
    model.requires_grad_(False).train()
    model.head.requires_grad_(True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    frozen = model(images)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(frozen, model.eval()(images))
    model.requires_grad_(True).train()
    model(images)
    moved = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert len(moved) == 2 * 52 and all("running" in key for key in moved)


def test_reads_features_without_classifier_and_adds_a_new_head(shared, images):
    model = load_pretrained("mobilenet-v2", shared / "weights" / WEIGHTS)
    assert isinstance(model.head, nn.Identity) and model.config.num_classes == 0
    model = load_pretrained("mobilenet-v2", shared / "weights" / WEIGHTS, num_classes=10).eval()
    assert model(images).shape == (2, 10)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (1, 49, 1280) and model.pooled(x).shape == (1, 1280)
        assert model.flat(x).shape == (1, 62720) and model.num_flat_features == 62720
        assert torch.equal(model.flat(x).view(1, 49, 1280), tokens)
        assert torch.allclose(model.pooled(x), tokens.mean(1), atol=1e-5)


def test_the_crop_keeps_its_proportion_at_other_sizes():
    for side, edge in ((224, 256), (112, 128)):
        preprocess = create_model("mobilenet-v2", width=0.25, image_size=side).preprocess
        assert (preprocess["image_size"], preprocess["resize_to"], preprocess["resize"]) == (side, edge, "shortest")


def test_parameter_counts_equal_the_listed_ones(shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        model = create_model("mobilenet-v2")
    assert count_parameters(model).total == counts["mobilenetv2_1000"]
    assert count_parameters(model.features).total == counts["mobilenetv2_features_params"]
    statistics = sum(buffer.numel() for buffer in model.features.buffers())
    assert statistics == counts["mobilenetv2_features_bn_stats"]
    assert count_parameters(model.features).total + statistics == counts["mobilenetv2_keras_total"]
    for file, layout in (("torchvision_mobilenet_v2", "torchvision"), ("timm_mobilenetv2_100", "timm")):
        lines = (shared / "keys" / f"{file}.txt").read_text().splitlines()
        keys = {line.split("\t")[0] for line in lines if not line.startswith("#")}
        table = {entry.theirs for entry in model.key_table(layout)}
        assert table == {key for key in keys if not key.endswith("num_batches_tracked")}


def test_bad_files_are_named(tmp_path):
    state = oracle("torchvision").state_dict()
    with pytest.raises(ModelError, match=r"missing 1: features\.3\.conv\.2\.weight"):
        broken = {key: tensor for key, tensor in state.items() if key != "features.3.conv.2.weight"}
        load_pretrained("mobilenet-v2", write_checkpoint(tmp_path / "a", broken))
    with pytest.raises(ModelError, match="wrong shape"):
        load_pretrained("mobilenet-v2-50", write_checkpoint(tmp_path / "b", state))


def class_means_accuracy(shared, per_class: int, tested: int) -> float:
    """Nearest-class-mean accuracy of the pooled features on ImageWoof, percent."""
    model = load_pretrained("mobilenet-v2", shared / "weights" / WEIGHTS).eval()
    mean, std = (torch.tensor(model.preprocess[key])[:, None, None] for key in ("mean", "std"))

    def features(split: str, name: str, count: int) -> torch.Tensor:
        files = sorted((shared / "imagewoof224" / split / name).iterdir())[:count]
        pictures = [Image.open(file).convert("RGB").resize((224, 224)) for file in files]
        x = torch.stack([(torchvision.transforms.functional.to_tensor(one) - mean) / std for one in pictures])
        with torch.no_grad():
            return nn.functional.normalize(model.pooled(x), dim=1)

    names = sorted(folder.name for folder in (shared / "imagewoof224" / "train").iterdir())
    means = torch.stack([features("train", name, per_class).mean(0) for name in names])
    means = nn.functional.normalize(means, dim=1)
    right = [(features("val", name, tested) @ means.T).argmax(1) == i for i, name in enumerate(names)]
    return 100 * torch.cat(right).float().mean().item()


def test_features_tell_dog_breeds_apart(shared):
    assert class_means_accuracy(shared, per_class=8, tested=6) >= 75


@pytest.mark.slow
def test_features_tell_85_percent_of_the_dog_breeds_apart(shared):
    assert class_means_accuracy(shared, per_class=120, tested=40) >= 85
