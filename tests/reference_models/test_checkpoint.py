"""What a checkpoint's files say is found and believed; what they do not say is assumed in the open."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, BertConfig, BertModel, CLIPModel, ViTConfig, ViTForImageClassification

from minilora.data.pictures.images import open_image
from minilora.data.pictures.transforms import build_transform
from minilora.errors import UserError
from minilora.settings.parse import parse_args
from minilora.tasks.weights import load_base, tokenizer_beside, weights_sha256
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.checkpoint import find_checkpoint
from reference_models.files.safetensors import read_weights
from reference_models.text.tokenizers import WordPieceTokenizer, load_tokenizer
from tests.reference_models.test_clip import hf_oracle, open_clip_oracle
from tests.support.parity import distance
from tests.support.text_parity import randomize

TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=64)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CROP = {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT of transformers, with other settings than the defaults of its name here."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(**TINY, patch_size=16, num_labels=3, hidden_act="quick_gelu", layer_norm_eps=1e-3)
    config.id2label = {0: "ant", 1: "bee", 2: "cow"}
    oracle = randomize(ViTForImageClassification(config)).eval()
    oracle.save_pretrained(folder)
    return folder, oracle


def photographs(shared):
    """A wide, a tall and an odd one, so that borders of every size are halved."""
    paths = sorted((shared / "daquar_small" / "val").glob("*.jpg"))[:2]
    wide, other = (open_image(path) for path in paths)
    return [wide, other.rotate(90, expand=True), wide.crop((3, 5, 296, 172)), other.crop((0, 0, 151, 200))]


# ---- pictures: as transformers' processors prepare them

PROCESSORS = {
    "ViT, squashed": {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}},
    "DeiT: squashed, then cropped": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 75, "width": 75}}
    | CROP | {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
    "DeiT of 2021": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 75, "crop_size": 64,
        "do_center_crop": True, "resample": 2},
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 72}} | CROP,
    "CLIP of 2021": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 64, "crop_size": 64},
    "Beit, its filter left out": {"image_processor_type": "BeitImageProcessor", "size": {"height": 64, "width": 64}},
    "Bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 67}} | CROP,
    "no normalisation": {"image_processor_type": "ViTImageProcessor", "size": 64, "do_normalize": False},
    "no rescaling": {"image_processor_type": "ViTImageProcessor", "size": 64, "do_rescale": False,
        "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 70.0]},
    "rescaled to 0..2": {"image_processor_type": "ViTImageProcessor", "size": 64, "rescale_factor": 1 / 127.5,
        "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config", "processor_config"])
def test_pictures_come_out_as_transformers_image_processor_makes_them(kind, nested, vit, shared, tmp_path):
    folder, settings = tmp_path, PROCESSORS[kind]
    for file in vit[0].iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32} if nested else settings))
    if nested:
        settings = {"image_processor": settings, "processor_class": "CLIPProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(settings))
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = load_pretrained(folder / "model.safetensors" if nested else folder)
    assert not any("assumed" in note for note in model.notes)
    transform = build_transform(model.preprocess)
    again = load_pretrained(save_pretrained(model, folder / "ours")).preprocess
    assert again == model.preprocess
    for picture in photographs(shared):
        (expected,) = theirs(picture, return_tensors="pt")["pixel_values"]
        assert distance(transform(picture), expected) < 1e-5
        assert distance(build_transform(again)(picture), expected) < 1e-5


def test_what_a_processor_does_beyond_is_noted(vit, tmp_path):
    for file in vit[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "preprocessor_config.json"
    for settings, word in (
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, "crop_pct": 0.9},
            "crop_pct",
        ),
        ({"do_resize": False, "size": 64}, "do_resize false"),
        ({"size": {"shortest_edge": 64, "longest_edge": 100}}, "longest_edge"),
    ):
        path.write_text(json.dumps(settings))
        assert any(word in note for note in load_pretrained(tmp_path).notes), word
    for broken in ({"size": {"height": "x", "width": 3}}, {"image_mean": [0, 1]}, {"resample": 9}, {"image_std": 0}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ModelError):
            load_pretrained(tmp_path)


def test_timms_squash_cuts_the_middle_where_crop_pct_says_so(tmp_path):
    model = create_model("vit-nano-patch8-48", pictures={"resize": "squash", "crop_pct": 0.75})
    assert model.preprocess["resize_to"] == 64
    folder = save_pretrained(model, tmp_path, "timm")
    data = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (data["crop_mode"], data["crop_pct"]) == ("squash", 0.75)
    assert load_pretrained(folder).preprocess == model.preprocess
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 91, 3), dtype=np.uint8))
    middle = picture.resize((64, 64), Image.Resampling.BILINEAR).crop((8, 8, 56, 56))
    plain = build_transform(create_model("vit-nano-patch8-48").preprocess)
    assert torch.equal(build_transform(model.preprocess)(picture), plain(middle))
    old = {key: value for key, value in model.preprocess.items() if key != "crop"}  # as a run of 0.1 has it
    assert torch.equal(build_transform(old)(picture), plain(picture))


# ---- a file in a folder is that folder's checkpoint


def test_a_file_in_a_folder_is_that_folders_checkpoint(vit, tmp_path):
    folder, oracle = vit
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(x).logits
    sizes = dict(dim=32, depth=1, heads=2, hidden=48)
    for name, weights in (("vit-nano-patch16-64", folder / "model.safetensors"), (folder, None), (str(folder), None)):
        model = load_pretrained(name, weights, **(sizes if weights else {})).eval()
        assert model.config.act == "quick_gelu" and model.config.eps == 1e-3 and model.labels == ["ant", "bee", "cow"]
        assert distance(model(x).detach(), expected) < 1e-5


def test_clips_activation_and_tokenizer_are_found_beside_the_file(tmp_path):
    theirs = hf_oracle("quick_gelu")
    theirs.save_pretrained(tmp_path)
    WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]).save(tmp_path)
    file = tmp_path / "model.safetensors"
    x, ids = torch.rand(1, 3, 24, 24), torch.tensor([[1, 5, 60]])
    loaded = load_pretrained("clip-vit-b-32", file, image_size=24)
    assert loaded.config.vision_act == loaded.config.text_act == "quick_gelu"
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(tmp_path).get_image_features(x).pooler_output
        assert distance(loaded.eval().encode_image(x), wanted) < 1e-5
        assert loaded.encode_text(ids).shape == (1, 20)
    assert tokenizer_beside(file) == find_checkpoint(file).tokenizer == tmp_path


def test_labels_of_another_number_than_the_head_has_are_not_its_labels(vit, tmp_path):
    for file in vit[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"id2label": {"0": "a", "1": "b"}}))
    model = load_pretrained(tmp_path, num_classes=3)
    assert model.labels is None and any("do not name its 3 classes" in note for note in model.notes)
    assert load_pretrained(vit[0], num_classes=3).labels == ["ant", "bee", "cow"]


def test_settings_of_an_unknown_model_beside_a_name_are_refused(vit, tmp_path):
    weights = (tmp_path / "model.safetensors").absolute()
    weights.write_bytes((vit[0] / "model.safetensors").read_bytes())
    for settings in ({"model_type": "levit"}, {"architecture": "resnet50"}, {"model_type": "wav2vec2"}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        for source in (weights, tmp_path):
            with pytest.raises(ModelError, match=next(iter(settings.values()))):
                load_pretrained("vit-nano-patch16-64", source)
    (tmp_path / "config.json").write_text('{"theme": "dark"}')
    sizes = dict(dim=32, depth=1, heads=2, hidden=48)
    assert "describes no model" in load_pretrained("vit-nano-patch16-64", weights, **sizes).notes[0]


def test_a_bert_that_decodes_is_refused_and_one_of_2018_is_read_as_its_settings_say(tmp_path):
    theirs = BertModel(
        BertConfig(vocab_size=30, **{**TINY, "image_size": None}, hidden_act="relu", layer_norm_eps=1e-2)
    )
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    for key in ("is_decoder", "add_cross_attention"):
        path.write_text(json.dumps(data | {key: True}))
        for name in ("bert-tiny", tmp_path):
            with pytest.raises(ModelError, match=key):
                load_pretrained(name, tmp_path)
    del data["model_type"]
    path.write_text(json.dumps(data))
    model = load_pretrained("bert-tiny", tmp_path / "model.safetensors").eval()
    assert (model.config.act, model.config.eps) == ("relu", 1e-2)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert distance(model(ids)[0], theirs.eval()(ids).last_hidden_state) < 1e-5


# ---- what a lone file leaves open


def lone(state: dict, path):
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path


def test_lone_clip_files_mean_the_activation_that_they_were_trained_with(tmp_path):
    oracle, config = open_clip_oracle(True)
    config["model_cfg"]["quick_gelu"] = False
    state = oracle.state_dict()
    sizes = dict(
        embed_dim=20, image_size=24, patch_size=8, vocab_size=61, context=12, vision_dim=32, vision_depth=2,
        vision_heads=4, vision_hidden=128, text_dim=24, text_depth=2, text_heads=2, text_hidden=96,
    )  # fmt: skip
    numbers = dict(input_resolution=torch.tensor(24), context_length=torch.tensor(12), vocab_size=torch.tensor(61))
    theirs = hf_oracle().state_dict()
    files = {
        "ViT-B-32.safetensors": (state | numbers, "clip-vit-b-32", "quick_gelu", False),
        "vit_b_32-quickgelu-laion400m.safetensors": (state, "clip-vit-b-32", "quick_gelu", False),
        "ViT_B_32_QuickGELU.safetensors": (state, "clip-vit-b-32", "quick_gelu", False),
        "laion2b.safetensors": (state, "clip-vit-b-32", "gelu", True),
        "metaclip.safetensors": (state, "clip-vit-b-32-quickgelu", "quick_gelu", False),
        "hf.safetensors": (theirs, "clip-vit-b-32", "quick_gelu", True),
    }
    for file, (tensors, name, act, noted) in files.items():
        hidden = {"vision_hidden": 48, "text_hidden": 40} if file.startswith("hf") else {}
        model = load_pretrained(name, lone(tensors, tmp_path / file), **sizes | hidden).eval()
        assert (model.config.vision_act, model.config.text_act) == (act, act), file
        assert any("activation" in note and file in note for note in model.notes) == noted, file
        if act == "quick_gelu" and tensors is not theirs:
            x = torch.rand(1, 3, 24, 24)
            with torch.no_grad():
                assert distance(model.encode_image(x), oracle.eval().encode_image(x)) < 1e-5


@pytest.mark.parametrize(
    ("layout", "file", "statistics", "interpolation"),
    [
        ("torchvision", "vit_b_16-c867db91", IMAGENET, "bilinear"),
        ("timm", "dino_vitbase16_pretrain", IMAGENET, "bicubic"),
        ("timm", "mae_pretrain_vit_base", IMAGENET, "bicubic"),
        ("timm", "weights", ([0.5] * 3, [0.5] * 3), "bilinear"),
        ("transformers4", "my_maestro", ([0.5] * 3, [0.5] * 3), "bilinear"),
    ],
)
def test_a_lone_file_says_in_one_note_how_pictures_are_prepared(layout, file, statistics, interpolation, tmp_path):
    folder = save_pretrained(create_model("vit-nano-patch8-48", num_classes=3), tmp_path / "whole", layout)
    path = (folder / "model.safetensors").rename(tmp_path / f"{file}.safetensors")
    model = load_pretrained("vit-nano-patch8-48", path)
    found = model.preprocess
    assert (found["mean"], found["std"]) == statistics and found["interpolation"] == interpolation
    assert (found["resize"], found["resize_to"]) == (("shortest", 55) if layout == "torchvision" else ("squash", 48))
    (note,) = model.notes
    numbers = " ".join(f"{x:.4g}" for x in statistics[0])
    assert all(word in note for word in (f"mean {numbers}", path.name, "--mean", "--crop-pct", interpolation)), note
    said = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "interpolation": "box", "resize": "crop", "crop_pct": 0.5}
    told = load_pretrained("vit-nano-patch8-48", path, pictures=said)
    assert told.notes == [] and told.preprocess == {
        **{"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "interpolation": "box"},
        **{"resize": "shortest", "resize_to": 96, "image_size": 48},
    }
    (note,) = load_pretrained("vit-nano-patch8-48", path, pictures={"mean": [0, 0, 0]}).notes
    assert "mean 0" not in note and "std" in note


def test_beits_second_version_is_told_by_its_name(tmp_path):
    folder = save_pretrained(create_model("beit-nano-patch8-48", num_classes=3), tmp_path / "whole", "timm")
    one = (folder / "model.safetensors").rename(tmp_path / "beitv2_base_patch16_224.safetensors")
    assert load_pretrained("beit-nano-patch8-48", one).preprocess["mean"] == IMAGENET[0]
    other = one.rename(tmp_path / "beit_base_patch16_224.safetensors")
    assert load_pretrained("beit-nano-patch8-48", other).preprocess["mean"] == [0.5] * 3


def test_windows_that_do_not_divide_the_patches_are_noted_for_timms_and_torchvisions_files_alone(tmp_path):
    model = create_model("swin-nano-patch4-window6-48", num_classes=3)
    for layout in ("timm", "torchvision", "transformers", "minilora"):
        folder = save_pretrained(model, tmp_path / layout, layout)
        for size, said in ((None, False), (56, layout in ("timm", "torchvision"))):
            notes = load_pretrained("swin-nano-patch4-window6-48", folder, image_size=size).notes
            assert any("windows: 6 x 6 do not divide the 14 x 14 patches of stage 1" in n for n in notes) == said


def test_flags_say_what_a_file_does_not_and_programs_print_what_was_assumed(tmp_path, capsys):
    config, _ = parse_args("--mean 0.1 0.2,0.3 --std 1 1 2 --interpolation box --resize squash".split())
    assert (config.mean, config.std, config.resize) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0), "squash")
    for words in (
        "--mean 1 2",
        "--std 1 0 1",
        "--interpolation magic",
        "--resize fit",
        "--crop-pct 1.5",
        "--mean a b c",
    ):
        with pytest.raises(UserError, match=words.split()[0]):
            parse_args(words.split())
    folder = save_pretrained(create_model("vit-nano-patch8-48", num_classes=3), tmp_path / "whole", "timm")
    path = (folder / "model.safetensors").rename(tmp_path / "some.safetensors")
    load_base("vit-nano-patch8-48", str(path), 0)
    assert "assumed, some.safetensors does not say" in capsys.readouterr().out
    said = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "box", "resize": "squash"}
    load_base("vit-nano-patch8-48", str(path), 0, pictures=said)
    assert capsys.readouterr().out == ""
    for wrong in ({"mean": [1, 2]}, {"crop_pct": 0}, {"resize": "fit"}, {"size": 3}, {"std": [0, 1, 1]}):
        with pytest.raises(ModelError):
            create_model("vit-nano-patch8-48", pictures=wrong)


# ---- weights that are not named


def test_a_name_alone_means_the_weights_that_come_with_it_and_none_means_random_ones(vit):
    one, two = load_pretrained("vit-nano-patch8-48"), load_pretrained("vit-nano-patch8-48", num_classes=3)
    assert torch.equal(one.norm.weight, two.norm.weight) and one.labels and two.head.weight.shape[0] == 3
    torch.manual_seed(5)
    random = load_pretrained("vit-nano-patch8-48", "none")
    torch.manual_seed(5)
    again = create_model("vit-nano-patch8-48")
    assert torch.equal(random.blocks[0].mlp.fc1.weight, again.blocks[0].mlp.fc1.weight)
    with pytest.raises(ModelError, match='vit-tiny-patch16-224 .*weights="none" or create_model'):
        load_pretrained("vit-tiny-patch16-224")
    empty = load_pretrained(vit[0], "none", num_classes=4)
    assert empty.config.act == "quick_gelu" and empty.head.weight.shape == (4, 32)
    whole = load_pretrained(vit[0])
    assert not torch.equal(empty.blocks[0].mlp.fc1.weight, whole.blocks[0].mlp.fc1.weight)


# ---- tokenizers that cut texts in another way


def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]
    WordPieceTokenizer(vocabulary).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    good = json.loads(path.read_text())
    for change in (
        {"tokenizer_class": "BertJapaneseTokenizer"}, {"word_tokenizer_type": "mecab"},
        {"tokenizer_class": "XLNetTokenizer"}, {"subword_tokenizer_type": "character"},
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(ModelError, match="|".join(change.values())):
            load_tokenizer(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(ModelError, match="config.json, key tokenizer_class: BertJapaneseTokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    model = {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(vocabulary)}}
    whole = {"model": model, "normalizer": {"type": "BertNormalizer"}, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    whole["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert load_tokenizer(tmp_path).encode("a") == [2, 4, 3]
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    for key, value in (
        ("pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
        ("pre_tokenizer", None), ("post_processor", {"type": "TemplateProcessing", "single": single, "pair": single}),
        ("post_processor", {"type": "Sequence", "processors": []}), ("normalizer", {"type": "NFKC"}),
    ):  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(ModelError, match=f"key {key}"):
            load_tokenizer(tmp_path)


# ---- files of other kinds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", ["model.ckpt", "model.pth.tar", "weights", "checkpoint.pt", "last.model"])
def test_what_torch_save_made_is_read_whatever_its_name(tmp_path, name, old):
    vit = create_model("vit-tiny-patch16-224", 3, image_size=16, dim=8, heads=2, hidden=16, depth=1)
    save_pretrained(vit, tmp_path)
    state = {"state_dict": vit.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not old)
    tensors, where = read_weights(tmp_path / name)
    assert where.endswith(name) and tensors.keys() == vit.state_dict().keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in vit.state_dict().items())


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            {"student": {"a": torch.ones(1)}, "teacher": {"b": torch.ones(1)}},
            r"student \(dict\), teacher \(dict\); save the",
        ),
        ({"net": {"a": torch.ones(1)}, "epoch": 3}, r"net \(dict\), epoch \(int\)"),
        ({}, "but dict"),
        ([torch.ones(1)], "but list"),
        ({f"k{i}": i for i in range(5000)}, r"k11 \(int\); save"),
        ({"model": {"encoder": {"a": torch.ones(1)}}}, r"model \(dict\)"),
    ],
)
def test_a_dictionary_of_something_else_names_its_keys_and_what_is_read(tmp_path, state, said):
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=said) as caught:
        read_weights(tmp_path / "model.ckpt")
    assert "Read are safetensors files and what torch.save made" in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize("head", [b"\x89HDF\r\n\x1a\n", b"GGUF", b"\x93NUMPY", b"version https://git-lfs", b"<html>"])
def test_another_format_is_refused_with_the_formats_that_are_read(tmp_path, head):
    (tmp_path / "model.h5").write_bytes(head + b"\0" * 200)
    with pytest.raises(ModelError, match=r"another format; read are safetensors and torch.save's .bin, .pt"):
        read_weights(tmp_path / "model.h5")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "other.safetensors"])
def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match="no weights here"):
            read_weights(source)
    save_pretrained(create_model("vit-tiny-patch16-224", 3, image_size=16, dim=8, heads=2, depth=1), tmp_path / "vit")
    os.mkfifo(tmp_path / "vit" / "zz.safetensors")
    assert weights_sha256(tmp_path / "vit") == weights_sha256(tmp_path / "vit" / "model.safetensors")
