"""Pruning: exact zeros that stay, the schedule, scopes, and smaller models that say what the large ones said."""

import json
import re
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from minilora import LoRAConfig, inject_lora, merge_lora
from minilora.commands import compression
from minilora.commands.compression import pruned_run
from minilora.compress.measure import median_seconds, model_size
from minilora.compress.prune import Pruner, magnitude_mask, polynomial_sparsity, scope_tensors
from minilora.compress.structured import mlp_layers, remove_mlp_units, units_kept
from minilora.errors import RunError, UserError
from minilora.settings.flags_evaluate import EvalConfig
from minilora.tasks import load_run
from reference_models import create_model, load_pretrained, save_pretrained
from reference_models.load import bundled_weights
from reference_models.text.tokenizers import load_tokenizer
from tests.support.cli_data import QUICK, program, write_photos
from tests.support.vqa_data import write_vqa

evaluate = program("evaluate")

NANO = "vit-nano-patch8-48"


def mobile():
    return create_model("mobilenet-v2-50", num_classes=4, image_size=32)


def zeros(weight) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.999])
def test_the_mask_drops_exactly_the_smallest_magnitudes(sparsity):
    weight = torch.randn(7, 3, 3, 3)
    mask = magnitude_mask(weight, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    if mask.any() and not mask.all():
        assert weight[mask].abs().min() > weight[~mask].abs().max()
    equal = magnitude_mask(torch.ones(5, 4), sparsity)
    assert int((~equal).sum()) == round(sparsity * 20)


def test_the_schedule_is_the_polynomial_of_its_docstring():
    values = [polynomial_sparsity(t, 10, 0.5, 0.8) for t in range(13)]
    assert values[0] == 0.5 and values[5] == pytest.approx(0.8 - 0.3 / 8) and values[10:] == [0.8] * 3
    assert values == sorted(values)
    assert polynomial_sparsity(0, 0, 0.5, 0.8) == 0.8


def test_each_scope_finds_its_own_weights_and_no_others():
    model = mobile()
    names = {scope: set(scope_tensors(model, scope)) for scope in ("conv", "backbone", "all")}
    assert names["conv"] == {n for n, p in model.named_parameters() if p.dim() == 4} == names["backbone"]
    assert names["all"] == names["backbone"] | {"head.weight"}
    student = create_model("student-nano", num_classes=4)
    names = {scope: set(scope_tensors(student, scope)) for scope in ("conv", "backbone", "all")}
    assert names["conv"] == {"vision.conv1.weight", "vision.conv2.weight"}
    assert names["backbone"] == names["conv"] | {"vision.fc.weight"}
    assert names["all"] == names["backbone"] | {
        "text.word.weight", "text.lstm.weight_ih_l0", "text.lstm.weight_hh_l0", "fusion.fc.weight", "head.weight",
    }  # fmt: skip
    plain = create_model(NANO, num_classes=4)
    before = scope_tensors(plain, "backbone").keys()
    adapted = inject_lora(plain, LoRAConfig(modules_to_save=("head",), init_lora_weights=False))
    assert scope_tensors(adapted, "backbone").keys() == before  # names of the merged model, no lora_A and lora_B
    assert "blocks.0.attn.q_proj.weight" in before and "head.weight" not in before


def test_zeros_stay_through_training_with_momentum_and_the_schedule_ends_where_it_should():
    model, images, labels = mobile(), torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pruner = Pruner(model, "conv", 0.8, start=0.5, steps=4)
    pruner.attach(optimizer)
    total = {name: weight.numel() for name, weight in scope_tensors(model, "conv").items()}
    assert pruner.check() == {name: round(0.5 * n) for name, n in total.items()}
    gone = {name: ~mask for name, mask in pruner.masks.items()}
    for step in range(1, 7):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        share = polynomial_sparsity(step, 4, 0.5, 0.8)
        assert pruner.check() == {name: round(share * n) for name, n in total.items()}
        for name, weight in scope_tensors(model, "conv").items():
            assert zeros(weight) == round(share * total[name])  # not one more, not one less
            assert not weight[gone[name]].any()  # what has gone does not come back
    pruner.finish()
    assert all(zeros(weight) == round(0.8 * total[name]) for name, weight in pruner.weights())
    assert not any(torch.signbit(weight[weight == 0]).any() for _, weight in pruner.weights())  # no -0.0


def test_a_schedule_that_was_cut_short_is_finished():
    model = mobile()
    pruner = Pruner(model, "all", 0.8, start=0.5, steps=100)
    pruner.step()
    pruner.finish()
    assert all(zeros(weight) == round(0.8 * weight.numel()) for _, weight in pruner.weights())


def test_merging_fills_zeros_and_the_masks_empty_them_again(tmp_path):
    model = create_model(NANO, num_classes=4)
    pruner = Pruner(model, "backbone", 0.6)
    wanted = pruner.check()
    inject_lora(model, LoRAConfig(target_modules=("q_proj", "fc1"), init_lora_weights=False))
    assert pruner.check() == wanted  # LoRA leaves the base weight alone
    merge_lora(model)
    with pytest.raises(RunError, match="blocks.0.attn.q_proj.weight: .* no longer zero"):
        pruner.check()
    pruner.apply()
    assert pruner.check() == wanted
    save_pretrained(model, tmp_path / "ours")
    save_pretrained(model, tmp_path / "timm", layout="timm")
    back = load_pretrained(tmp_path / "ours")
    for name, count in wanted.items():
        assert zeros(back.get_parameter(name)) == count
    exported = load_file(tmp_path / "timm/model.safetensors")
    assert zeros(exported["blocks.0.attn.qkv.weight"]) == sum(
        wanted[f"blocks.0.attn.{part}_proj.weight"] for part in "qkv"
    )


def test_the_zipped_file_shrinks_by_more_than_half_of_the_pruned_bytes(tmp_path):
    model, sizes, pruned = mobile(), [], 0
    for name in ("whole", "pruned"):
        if name == "pruned":
            pruned = 4 * sum(Pruner(model, "conv", 0.8).check().values())
        save_file(model.state_dict(), tmp_path / name)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / name, name)
        sizes.append((model_size(model), (tmp_path / f"{name}.zip").stat().st_size))
    (whole, zip_whole), (small, zip_small) = sizes
    assert zip_whole - zip_small > pruned / 2 and whole.zipped - small.zipped > pruned / 2
    assert small.stored == whole.stored and small.parameters == whole.parameters
    assert abs(zip_small - small.zipped) < 1000  # the archive's own lines
    assert whole.nonzero - small.nonzero == pruned // 4


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), True, "0.5"])
def test_a_sparsity_outside_the_range_is_refused(sparsity):
    for prune in (lambda model: Pruner(model, "all", sparsity), lambda model: remove_mlp_units(model, sparsity)):
        with pytest.raises(UserError, match="at least 0 and below 1"):
            prune(create_model(NANO, num_classes=4))


def test_a_scope_that_is_unknown_or_matches_nothing_is_refused():
    model = create_model(NANO, num_classes=4)
    with pytest.raises(UserError, match="'conv' matches nothing in VisionTransformer"):
        Pruner(model, "conv", 0.5)
    with pytest.raises(UserError, match="the choices are conv, backbone, all"):
        Pruner(model, "head", 0.5)
    with pytest.raises(UserError, match="has no MLP units"):
        remove_mlp_units(mobile(), 0.5)
    with pytest.raises(UserError, match="begins at 0.9 and ends at 0.8"):
        Pruner(model, "all", 0.8, start=0.9)


def test_removed_units_that_did_nothing_change_nothing():
    """Half of the units get zero columns: exactly they go, and the answers stay."""
    model = create_model(NANO, num_classes=4).eval()
    images, dead = torch.randn(3, 3, 48, 48), {}
    with torch.no_grad():
        for name, mlp in mlp_layers(model).items():
            nn.init.normal_(mlp.fc1.bias)
            dead[name] = torch.randperm(512)[:256]
            mlp.fc2.weight[:, dead[name]] = 0
        expected = model(images)
        rows = {name: mlp.fc1.weight.clone() for name, mlp in mlp_layers(model).items()}
        remove_mlp_units(model, 0.5, lambda: model(images))
        torch.testing.assert_close(model(images), expected)
    for name, mlp in mlp_layers(model).items():
        alive = [i for i in range(512) if i not in set(dead[name].tolist())]
        assert torch.equal(mlp.fc1.weight, rows[name][alive])


def test_units_that_never_change_become_a_bias():
    """A unit with a constant activation is removed without a trace: its mean moves into fc2's bias."""
    model = create_model(NANO, num_classes=4).eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        for mlp in mlp_layers(model).values():
            mlp.fc1.weight[100:200], mlp.fc1.bias[100:200] = 0, 2.0
        expected = model(images)
        remove_mlp_units(model, 100 / 512, lambda: model(images))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert mlp.fc1.out_features == 412


def test_a_smaller_vit_is_saved_loaded_and_adapted_as_any_other(tmp_path):
    model = create_model(NANO, num_classes=4)
    inject_lora(model, LoRAConfig(init_lora_weights=False))
    whole = model_size(merge_lora(create_model(NANO, num_classes=4)))
    small = remove_mlp_units(model, 0.5)  # LoRA is merged on the way
    assert small.config.hidden == 256
    assert whole.parameters - model_size(small).parameters == 4 * 256 * (2 * 128 + 1)
    images = torch.randn(2, 3, 48, 48)
    for layout in ("minilora", "transformers", "timm"):
        save_pretrained(small, tmp_path / layout, layout=layout)
        back = load_pretrained(tmp_path / layout).eval()
        assert back.config.hidden == 256
        torch.testing.assert_close(back(images), small.eval()(images))
    inject_lora(back, LoRAConfig(target_modules=("fc1", "fc2"), init_lora_weights=False))
    assert merge_lora(back)(images).shape == (2, 4)


def test_both_towers_of_a_pair_shrink_and_say_so(tmp_path):
    model = create_model("vqa-nano", num_classes=5)
    sizes = {name: mlp.fc1.out_features for name, mlp in mlp_layers(model).items()}
    fused = model.config.hidden
    remove_mlp_units(model, 0.25)
    assert {name: mlp.fc1.out_features for name, mlp in mlp_layers(model).items()} == {
        name: units_kept(hidden, 0.25) for name, hidden in sizes.items()
    }
    assert model.config.hidden == fused and model.config.vision == model.vision.config
    save_pretrained(model, tmp_path)
    ids = torch.randint(5, (2, 6))
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(
        load_pretrained(tmp_path).eval()(images, ids), model.eval()(images, ids), rtol=1e-5, atol=1e-6
    )


def test_timed_calls_take_turns_after_a_warm_up():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = median_seconds(calls, rounds=3, at_least=0)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3 and set(times) == {"a", "b"} and min(times.values()) > 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """A LoRA run of the nano ViT, and a run of a MobileNet, each of a few steps."""
    folder, words = tmp_path_factory.mktemp("runs"), ["--data-dir", str(photos), "--max-steps", "2"]
    train = program("train").main
    assert train([*QUICK, *words, "--output", str(folder / "vit")]) == 0
    mobile = ["--model", "mobilenet-v2-35", "--weights", "none", "--image-size", "32", "--batch-size", "4"]
    assert train([*mobile, *words, "--mode", "full", "--output", str(folder / "mobile")]) == 0
    return folder


def table_of(printed: str) -> dict[str, list[str]]:
    """{model: its cells} of the comparison table that evaluate.py prints last."""
    lines = printed.partition("\nmodel ")[2].splitlines()[2:]
    return {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in lines if "  " in line}


@pytest.mark.parametrize("epochs", [0, 1])
def test_evaluate_prunes_convolutions_shows_sizes_and_writes_the_model(runs, tmp_path, capsys, epochs):
    words = [str(runs / "mobile"), "--prune", "0.8", "--prune-scope", "conv", "--prune-epochs", str(epochs)]
    assert evaluate.main([*words, "--merge-to", str(tmp_path), "--layout", "torchvision"]) == 0
    table = table_of(capsys.readouterr().out)
    whole, pruned = table["mobile"], table["mobile, 0.8 of conv pruned"]
    assert whole[0] == pruned[0] and whole[2] == pruned[2] and float(pruned[3]) < 0.6 * float(whole[3])
    saved = load_file(tmp_path / "model.safetensors")
    kernels = [tensor for tensor in saved.values() if tensor.dim() == 4]
    assert len(kernels) == 52
    assert all(zeros(kernel) == round(0.8 * kernel.numel()) for kernel in kernels)


def test_evaluate_removes_units_recovers_through_lora_and_train_goes_on_from_there(runs, photos, tmp_path, capsys):
    words = [str(runs / "vit"), "--prune", "0.5", "--prune-scope", "units", "--prune-epochs", "1"]
    assert evaluate.main([*words, "--merge-to", str(tmp_path / "small"), "--layout", "minilora"]) == 0
    table = table_of(capsys.readouterr().out)
    whole, small = table["vit"], table["vit, 0.5 of units pruned"]
    gone = int(whole[0].replace(",", "")) - int(small[0].replace(",", ""))
    assert gone == 4 * 256 * (2 * 128 + 1) and float(small[2]) < 0.75 * float(whole[2])
    back = load_pretrained(tmp_path / "small")
    assert back.config.hidden == 256 and back.labels == ["class_0", "class_1", "class_2"]
    words = ["--model", str(tmp_path / "small"), "--data-dir", str(photos), "--max-steps", "1"]
    assert program("train").main([*words, "--output", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    assert run.model.config.hidden == 256 and run.model.head.weight.shape == (3, 128)


def test_a_pruned_question_answerer_learns_on_with_its_own_answers_and_tokens(tmp_path):
    """The run knows answers in another order than its data would give them, and reads a vocabulary of its own."""
    data, vocab = write_vqa(tmp_path / "vqa", train=6, val=2), tmp_path / "vocab.txt"
    bundled = load_tokenizer(bundled_weights("bert-nano"))
    vocab.write_text("\n".join([*bundled.tokens, "unheard"]) + "\n")
    words = ["--task", "vqa", "--model", "student-nano", "--mode", "full", "--data-dir", str(data)]
    words += ["--tokenizer", str(vocab), "--max-steps", "1", "--batch-size", "8"]
    assert program("train").main([*words, "--output", str(tmp_path / "run")]) == 0
    names = json.loads((tmp_path / "run/labels.json").read_text())
    (tmp_path / "run/labels.json").write_text(json.dumps({key: values[::-1] for key, values in names.items()}))
    run, seen = load_run(tmp_path / "run"), []
    small = pruned_run(run, EvalConfig(prune=0.8, prune_scope="conv", prune_epochs=1))
    assert [zeros(conv.weight) for conv in (small.model.vision.conv1, small.model.vision.conv2)] == [346, 3686]
    rows = compression.compression_rows([run, small], ["whole", "small"], EvalConfig(), rounds=1)
    assert [row["accuracy"] for row in rows] == [one.evaluate(EvalConfig()).scores["accuracy"] for one in (run, small)]
    assert all(set(row["seconds"]) == {1, 64} for row in rows)
    build = compression.build_task

    def spy(config, device, taught):
        seen.append(build(config, device, taught))
        return seen[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "build_task", spy)
        pruned_run(run, EvalConfig(prune=0.8, prune_scope="conv", prune_epochs=1))
    assert seen[0].labels == run.labels == names["labels"][::-1] and seen[0].teacher is None
    assert seen[0].tokenizer.vocab == run.tokenizer.vocab and "unheard" in run.tokenizer.vocab


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prune", "1"], "--prune must be"),
        (["--prune", "-0.1"], "--prune must be"),
        (["--prune-scope", "conv"], "--prune-scope needs --prune"),
        (["--prune", "0.5", "--prune-scope", "conv"], "'conv' matches nothing in VisionTransformer"),
        (["--prune", "0.5", "--export-adapter", "x"], "a pruned model has its adapter merged"),
    ],
)
def test_evaluate_says_what_is_wrong_before_it_computes(runs, words, message, capsys):
    with pytest.raises(UserError, match=message):
        evaluate.main([str(runs / "vit"), *words])
    assert capsys.readouterr().out == ""
