"""Multiple choice with CLIP: counts of R2, loss and logits, prefix sharing, fp16, submissions, zero-shot."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

import minilora.tasks.choice.task as choice
from minilora.commands.results import report_data
from minilora.errors import UserError
from minilora.inject import count_parameters, lora_layers, lora_state_dict
from minilora.report.page import write_report
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import parse_args, read_recipe
from minilora.tasks import build_task, load_run
from minilora.tasks.choice.task import PROMPT, ChoicePrompt
from minilora.tasks.classify.prompts import class_texts
from minilora.tasks.method import make_trainable
from minilora.training.trainer import Trainer, TrainOptions
from reference_models import create_model, load_pretrained
from reference_models.text.tokenizers import load_tokenizer
from tests.support.choice_data import tiny_clip, wordpiece, write_clip, write_scpc, write_visual7w
from tests.support.cli_data import program, write_photos
from tests.support.parity import BOUNDS

QUICK = ["--task", "choice", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scpc(tmp_path_factory):
    return write_scpc(tmp_path_factory.mktemp("scpc"))


def task_of(clip, data, *words):
    config, _ = parse_args([*QUICK, "--model", str(clip), "--data-dir", str(data), *words])
    return build_task(config)


def first_batch(task):
    return next(iter(task.train_loader(0, task.train_batches(0))))


def trained(clip, data, folder, *words):
    assert program("train").main(
        [*QUICK, "--model", str(clip), "--data-dir", str(data), "--output", str(folder), "--epochs", "1", *words]
    ) == 0  # fmt: skip
    return folder


def test_recipe_choice_clip_trains_6488064_of_434104577_parameters():
    """REPORTS R2: 427,616,513 + 6,488,064 = 434,104,577, on the meta device."""
    config, _ = parse_args(["--recipe", "choice-clip"])
    with torch.device("meta"):
        model = create_model(config.model)
        assert count_parameters(model).total == 427_616_513
        make_trainable(model, config, ())
    assert count_parameters(model) == (6_488_064, 434_104_577)
    assert str(count_parameters(model)).endswith("trainable%: 1.4946")
    assert not any("projection" in name for name, _ in lora_layers(model))
    assert {name.split(".")[-1] for name, _ in lora_layers(model)} == {"q_proj", "v_proj", "out_proj"}


def test_recipe_choice_clip_has_the_reports_settings():
    wanted = {
        "lora_r": 32, "lora_alpha": 64, "seed": 41, "batch_size": 64, "lr": 1e-4, "opt": "adamw", "weight_decay": 0.015,
        "sched": "plateau", "val_split": 0.15, "epochs": 6, "smoothing": 0.1, "amp": "fp16", "prompt": PROMPT,
    }  # fmt: skip
    recipe = read_recipe("choice-clip")
    assert {key: recipe[key] for key in wanted} == wanted


def test_each_mode_trains_what_it_says(clip, scpc):
    parts = {"vision.", "text.", "visual_projection", "text_projection", "logit_scale"}
    names = set(lora_state_dict(task_of(clip, scpc).model))
    assert all(".lora_" in name for name in names) and len(names) == 2 * 3 * (1 + 2)
    linear = set(lora_state_dict(task_of(clip, scpc, "--mode", "linear").model))
    assert linear == {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    full = set(lora_state_dict(task_of(clip, scpc, "--mode", "full").model))
    assert all(any(name.startswith(part) for name in full) for part in parts)


def test_each_tower_gets_its_own_ranks_and_targets(clip, scpc):
    ranks = ["--lora-r", "vision=2", "text=4", "--lora-alpha", "vision=2", "text=4"]
    task = task_of(clip, scpc, *ranks, "--target-modules", "vision.q_proj", "text.fc1")
    found = {name: layer.lora_A.out_features for name, layer in lora_layers(task.model)}
    assert found == {"vision.blocks.0.attn.q_proj": 2, "text.blocks.0.mlp.fc1": 4, "text.blocks.1.mlp.fc1": 4}


def test_loss_is_label_smoothed_cross_entropy_of_scaled_cosines(clip, scpc):
    task = task_of(clip, scpc, "--smoothing", "0.1")
    batch, model = first_batch(task), task.model.eval()
    loss, stats = task.loss(model, batch)
    logits = []
    for row, ids in zip(batch["picture"], batch["input_ids"], strict=True):
        image = F.normalize(model.encode_image(batch["image"][row : row + 1]), dim=-1)
        logits.append(model.logit_scale.exp() * image[0] @ F.normalize(model.encode_text(ids), dim=-1).T)
    logits = torch.stack(logits)  # (B, C)
    target = 0.9 * F.one_hot(batch["label"], 4) + 0.1 / 4
    torch.testing.assert_close(loss, -(target * logits.log_softmax(-1)).sum(-1).mean(), atol=1e-6, rtol=1e-6)
    assert stats["count"] == 4 and stats["correct"] == (logits.argmax(-1) == batch["label"]).sum()


def test_choices_sharing_their_prefix_give_the_plain_logits_and_lora_gradients(clip, scpc, monkeypatch):
    """In float64, where a difference would be a mistake and not rounding."""
    task = task_of(clip, scpc)
    model, batch = task.model.train().double(), first_batch(task)
    batch["image"] = batch["image"].double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.1)
    assert batch["share"]  # a long question, short choices
    found = []
    for shared in (True, False):
        monkeypatch.setattr(choice, "share_prefix", shared)
        model.zero_grad()
        logits = task.predictor.logits(model, batch)
        logits.softmax(-1)[:, 0].log().mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= 1e-10 * max(1.0, plain.abs().max().item())


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("legacy_eos", [False, True])
def test_logits_are_transformers_from_every_layout_and_tokenizer_file(act, legacy_eos, scpc, tmp_path):
    """The same weights in transformers' and open_clip's files, the tokenizer as vocab.json and as tokenizer.json."""
    acts = {"vision_act": act, "text_act": act}
    kinds = (("transformers", "vocab.json"), ("open_clip", "tokenizer.json"), ("minilora", "vocab.json"))
    folders = [write_clip(tmp_path / layout, layout, kind, legacy_eos=legacy_eos, **acts) for layout, kind in kinds]
    theirs = transformers.CLIPModel.from_pretrained(folders[0]).eval()
    results = []
    for folder in folders:
        task = task_of(folder, scpc, "--seed", "3")
        batch = first_batch(task)
        with torch.no_grad():
            results.append(task.predictor.logits(task.model.eval(), batch))
    wanted = []
    for row, ids in zip(batch["picture"], batch["input_ids"], strict=True):
        with torch.no_grad():
            out = theirs(input_ids=ids, pixel_values=batch["image"][row : row + 1])
        wanted.append(out.logits_per_image[0])
    for result in results:
        assert (result - torch.stack(wanted)).abs().max() <= BOUNDS[torch.float32] * result.std().clamp(min=1)


def test_long_questions_are_cut_not_the_choices(clip):
    tokenizer = load_tokenizer(clip)
    config, _ = parse_args([*QUICK, "--max-length", "30"])
    prompt = ChoicePrompt(tokenizer, config, SimpleNamespace(name="clip", context=40))
    rows = prompt("what is it?", ["a cat", "a dog"])
    assert prompt.cut == 0 and prompt.note() == []
    rows = prompt("what is " + "the cat " * 30, ["a cat", "a dog"])
    assert prompt.cut == 1 and max(map(len, rows)) <= 30
    assert rows[0] != rows[1] and all(row[-1] == tokenizer.eos_id for row in rows)
    assert tokenizer.decode(rows[1]).endswith("answer : a dog")
    rows = prompt("what?", ["cat " * 50, "a dog"])
    assert prompt.cut == 2 and len(rows[0]) == 30 and rows[0][-1] == tokenizer.eos_id
    assert prompt.note() == [
        "warning: 2 questions are longer than 30 tokens with the choices; the end of the question was cut"
    ]
    with pytest.raises(UserError, match="--max-length 30: .* reads at most 20 tokens; use at most that"):
        ChoicePrompt(tokenizer, config, SimpleNamespace(name="clip", context=20))


def test_prompt_is_filled_in_literally(clip):
    config, _ = parse_args([*QUICK, "--prompt", "{choice}: {question} {x}"])
    tokenizer = load_tokenizer(clip)
    (row, _) = ChoicePrompt(tokenizer, config, SimpleNamespace(context=40))("is {choice} it", ["cat", "dog"])
    assert tokenizer.decode(row) == tokenizer.decode(tokenizer.encode("cat: is cat it {x}"))


def test_32_questions_are_learned_by_heart(tmp_path):
    """The overfit test: random weights, 32 generated questions, 100 % on the training data."""
    clip = write_clip(tmp_path / "clip", embed_dim=32)
    config, _ = parse_args(
        [*QUICK, "--model", str(clip), "--subset", "16", "--batch-size", "32", "--mode", "full", "--lr", "3e-3"]
    )
    task = build_task(config)
    assert len(task.data["train"]) == 32
    task.data["val"] = task.data["train"]  # only the training data count here
    options = TrainOptions(epochs=60, lr=3e-3, sched="constant", early_stop=0, log_interval=0)
    assert Trainer(task, options, tmp_path / "run", "cpu").fit()["best"]["accuracy"] == 1.0


def test_fp16_overflow_is_skipped_and_counted_and_training_goes_on(clip, scpc, tmp_path, capsys):
    task = task_of(clip, scpc, "--amp", "fp16", "--base-dtype", "fp16")
    assert {p.dtype for p in task.model.parameters() if p.requires_grad} == {torch.float32}
    assert task.model.vision.blocks[0].mlp.fc1.weight.dtype == torch.float16
    trainer = Trainer(task, TrainOptions(epochs=8, amp="fp16", lr=1e-3, log_interval=0), tmp_path, "cpu")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    result = trainer.fit()
    overflows = result["history"][-1]["fp16_overflows"]
    assert 1 <= overflows < result["steps"] and f"fp16_overflows {overflows}" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_cached_features_give_the_same_run(clip, scpc):
    words = ["--mode", "linear"]
    plain, kept = task_of(clip, scpc, *words), task_of(clip, scpc, *words, "--cache-features")
    for part in (0, 1):
        rows = plain.train_batches(0)[part : part + 1]
        losses = [task.loss(task.model.eval(), next(iter(task.train_loader(0, rows))))[0] for task in (plain, kept)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    assert plain.evaluate(plain.model) == pytest.approx(kept.evaluate(kept.model))


def test_questions_about_broken_pictures_are_left_out_of_the_loss(clip, tmp_path):
    data = write_scpc(tmp_path / "data")
    (data / "img/p1.png").write_bytes(b"nothing")
    task = task_of(clip, data, "--bad-data", "skip", "--batch-size", "12")
    batch = first_batch(task)
    good = batch["valid"]
    assert 0 < good.sum() < len(good)
    loss, stats = task.loss(task.model.eval(), batch)
    logits = task.predictor.logits(task.model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits[good], batch["label"][good]))
    assert stats["count"] == good.sum()


def test_submission_has_a_row_for_every_line_of_the_test_file(clip, tmp_path, capsys):
    data = write_scpc(tmp_path / "data")
    run = trained(clip, data, tmp_path / "run")
    (data / "img/p1.png").write_bytes(b"nothing")
    files = ["--split", "test", "--submission", str(tmp_path / "s.csv"), "--predictions", str(tmp_path / "p.csv")]
    assert program("evaluate").main([str(run), *files]) == 0
    assert "2 of 6 questions have a picture that cannot be read" in capsys.readouterr().out
    with open(tmp_path / "s.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ID", "answer"] and [row[0] for row in rows[1:]] == [f"TEST_{i:03d}" for i in range(6)]
    assert all(row[1] in "ABCD" for row in rows[1:])
    with open(tmp_path / "p.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["answer"] == "" for row in table] == [False, False, True, True, False, False]
    for row, answer in zip(table, rows[1:], strict=True):
        if row["answer"]:
            assert row["answer"] == answer[1]
            assert sum(float(row[letter]) for letter in "ABCD") == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def run_of_visual7w(clip, tmp_path_factory):
    root = tmp_path_factory.mktemp("v7w")
    return trained(clip, write_visual7w(root / "data"), root / "run"), root / "data"


def test_visual7w_results_and_accuracy_by_type(run_of_visual7w, tmp_path, capsys):
    run, data = run_of_visual7w
    assert program("evaluate").main([str(run), "--submission", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "baseline: chance 25.00 %" in out and "who" in out and "where" in out
    records = json.loads((tmp_path / "r.json").read_text())
    assert [record["qa_id"] for record in records] == [20, 21, 50, 51]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    by_type = {key.partition("/")[2]: value for key, value in row.items() if key.startswith("accuracy/")}
    assert set(by_type) == {"who", "where"}
    right = [record["candidates"][0]["answer"].startswith("Right") for record in records]
    found = load_run(run).evaluate(EvalConfig())
    assert found.scores["accuracy"] == sum(right) / 4
    assert found.vqa["by_question_type"] == pytest.approx({kind: 100 * value for kind, value in by_type.items()})


def test_a_run_answers_one_question(run_of_visual7w, capsys):
    run, data = run_of_visual7w
    image = str(data / "images/p0.png")
    words = [str(run), "--image", image, "--question", "Who is there?", "--choices", "A boy.", "A dog.", "No, nobody."]
    assert program("evaluate").main(words) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("A boy.", "A dog.", "No, nobody.", "%"))
    opened = load_run(run)
    (row,) = opened.predict([image], "Who is there?", ["A boy.", "A dog.", "No, nobody."])
    assert sum(p for _, p in row) == pytest.approx(1) and row == sorted(row, key=lambda pair: -pair[1])
    for question, choices, message in (
        ("Who?", None, "needs --question"),
        (None, ["a", "b"], "needs --question"),
        ("  ", ["a", "b"], "needs --question"),
        ("Who?", ["a"], "1 choice; a question needs 2 to 26"),
        ("Who?", ["a"] * 27, "27 choices; a question needs 2 to 26"),
        ("Who?", ["a", " "], "choice B is empty"),
    ):
        with pytest.raises(UserError, match=message):
            opened.predict([image], question, choices)


def test_report_page_shows_questions_with_their_choices(run_of_visual7w, tmp_path):
    run = load_run(run_of_visual7w[0])
    evaluation = run.evaluate(EvalConfig())
    write_report(report_data([run], [evaluation], EvalConfig(attention=2)), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Who is at 2?" in page and "Right 2." in page and "Question types" in page and "Attention" in page
    assert "baseline: chance" in page and "25.00 %" in page and "Confusion" not in page  # of places A to D
    assert (run_of_visual7w[0] / "attention.png").is_file()


@pytest.mark.parametrize("mode", ["lora", "full", "linear"])
def test_a_run_opens_again_and_gives_the_same_answers(mode, clip, scpc, tmp_path):
    run_dir = trained(clip, scpc, tmp_path / "run", "--mode", mode)
    moved = run_dir.rename(tmp_path / "elsewhere")
    run = load_run(moved)
    best = json.loads((moved / "summary.json").read_text())["best"]
    assert run.evaluate(EvalConfig()).scores["accuracy"] == best["accuracy"]
    assert program("evaluate").main([str(moved), "--merge-to", str(tmp_path / "out"), "--layout", "transformers"]) == 0
    plain = load_pretrained(tmp_path / "out").eval()
    assert load_tokenizer(tmp_path / "out").vocab == run.tokenizer.vocab
    batch = run.batch(2, EvalConfig())
    with torch.no_grad():
        torch.testing.assert_close(run.predictor.logits(plain, batch), run.logits(batch), atol=1e-5, rtol=1e-5)


def test_random_weights_need_a_tokenizer_and_come_back_the_same(clip, scpc, tmp_path):
    words = ["--model", "clip-vit-b-32", "--weights", "none"]
    config, _ = parse_args([*QUICK, *words, "--data-dir", str(scpc)])
    with pytest.raises(UserError, match="--tokenizer is missing, and there is none bundled for clip-vit-b-32"):
        build_task(config)
    run = trained("clip-nano", scpc, tmp_path / "run", "--weights", "none", "--tokenizer", str(clip))
    assert load_run(run).evaluate(EvalConfig()).scores is not None


def test_wrong_tokenizers_and_models_are_named(clip, scpc, tmp_path):
    with pytest.raises(UserError, match="--weights is missing, and clip-vit-b-32 is not bundled"):
        task_of("clip-vit-b-32", scpc)
    other = write_clip(tmp_path / "other", kind="vocab.json")
    with pytest.raises(UserError, match="tokens, clip-nano knows 220; it belongs to another model"):
        task_of(clip, scpc, "--tokenizer", str(other))
    with pytest.raises(UserError, match="ends texts with token 3, clip-nano looks for"):
        task_of(other, scpc, "--tokenizer", str(clip))
    with pytest.raises(UserError, match="is no CLIP"):
        task_of("vit-nano-patch8-48", scpc, "--tokenizer", str(clip))


def test_zero_shot_scores_the_base_model_on_questions(clip, scpc, capsys):
    words = ["--task", "choice", "--model", str(clip), "--device", "cpu"]
    assert program("evaluate").main([*words, "--data-dir", str(scpc), "--split", "train"]) == 0
    assert "zero-shot" in capsys.readouterr().out
    task = task_of(clip, scpc)
    with torch.no_grad():
        accuracy = task.evaluate(task.model.eval())["accuracy"]
    assert program("evaluate").main([*words, "--data-dir", str(scpc), "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {100 * accuracy:.2f} % ±" in out and "baseline: chance 25.00 %" in out


def test_zero_shot_scores_class_folders_by_prompts(clip, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos")
    words = ["--model", str(clip), "--data-dir", str(photos), "--device", "cpu"]
    assert program("evaluate").main(words) == 0
    out = capsys.readouterr().out
    assert "zero-shot with 'a photo of a {}.', val, 6 pictures: accuracy" in out
    assert "among 3 classes | baseline: chance 33.33 %" in out
    assert class_texts(["Border_terrier", "orange"], None) == ["a photo of a Border terrier.", "a photo of an orange."]
    assert class_texts(["orange"], "{}, a dog") == ["orange, a dog"]
    with pytest.raises(UserError, match="must contain {} once"):
        program("evaluate").main([*words, "--prompt", "a photo"])


def test_the_answers_depend_on_the_pictures(clip, scpc, monkeypatch):
    """As in the text-only row of the benchmark: the same questions, all about one grey picture."""
    seeing, blind = task_of(clip, scpc), task_of(clip, scpc)
    for data in blind.data.values():
        monkeypatch.setattr(data.split.pictures, "load", lambda i: Image.new("RGB", (48, 48), (60, 60, 60)))
    found = [task.predictions(task.model.eval(), "val").probabilities for task in (seeing, blind)]
    assert found[0].shape == found[1].shape and np.abs(found[0] - found[1]).max() > 1e-5


def test_real_visual7w_runs_end_to_end_in_both_layouts(shared, tmp_path):
    for layout, kind in (("transformers", "vocab.json"), ("open_clip", "tokenizer.json")):
        clip = write_clip(tmp_path / layout, layout, kind, context=77)
        data = shared / "visual7w_small"
        run = trained(clip, data, tmp_path / f"run-{layout}", "--subset", "12", "--batch-size", "16", "--seed", "41")
        found = load_run(run).evaluate(EvalConfig(split="test"))
        assert len(found.rows) == 77 and set(found.vqa["by_question_type"]) == {"who", "when", "where"}


def test_tiny_clip_is_not_symmetric():
    """The helper's weights are random everywhere: texts and pictures differ in what they say."""
    model = tiny_clip(wordpiece())
    a, b = model.encode_text(torch.tensor([[2, 10, 3], [2, 11, 3]]))
    assert (a - b).abs().max() > 1e-3
