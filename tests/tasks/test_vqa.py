"""The VQA task: shared pictures encoded once, the same numbers grouped or not, cached or not; runs and answers."""

import json

import numpy as np
import pytest
import torch

from minilora.data.questions.vqa2 import Question, read_vqa2
from minilora.data.vqa_sets import Answers
from minilora.errors import UserError
from minilora.inject import count_parameters, inject_lora
from minilora.report.vqa_metric import vqa_accuracy
from minilora.settings.flags import Config
from minilora.settings.parse import parse_args, read_recipe, read_run_config, read_toml
from minilora.tasks import build_task, load_run
from minilora.tasks.method import lora_config
from minilora.tasks.vqa.task import SoftTargets
from minilora.training.distributed import share_steps
from reference_models import create_model
from reference_models.load import bundled_weights
from reference_models.text.tokenizers import load_tokenizer
from tests.support.cli_data import program
from tests.support.vqa_data import records, write_json, write_pictures, write_vqa

SMALL = dict(task="vqa", weights="none", batch_size=8, fusion="concat", device="cpu", epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_vqa(tmp_path_factory.mktemp("vqa")))


def task_of(folder, **flags):
    return build_task(Config(**SMALL | {"data_dir": folder} | flags))


def counted(task) -> list[int]:
    """The sizes of the picture batches that the picture tower sees from now on."""
    seen, tower = [], task.model.vision
    tower.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


def test_encoder_passes_of_an_epoch_are_the_distinct_pictures(folder):
    task = task_of(folder, group_by_image=True)
    seen = counted(task)
    for batch in task.train_loader(0, task.train_batches(0)):
        task.loss(task.model, batch)
    assert sum(seen) == 12 == len(task.data["train"].part.shown)
    seen.clear()
    task.evaluate(task.model.eval())
    assert sum(seen) == 6, "evaluation groups always"


def test_grouped_loss_and_gradients_are_those_of_one_picture_per_question(folder):
    task = task_of(folder, group_by_image=True, target_modules=("q_proj", "v_proj", "fc1"))
    for name, parameter in task.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (batch,) = task.train_loader(0, task.train_batches(0)[:1])
    plain = batch | {
        "image": batch["image"][batch["image_index"]],
        "image_index": torch.arange(len(batch["index"])),
        **{key: batch[key][batch["text_index"]] for key in ("input_ids", "attention_mask")},
        "text_index": torch.arange(len(batch["index"])),
    }
    assert len(batch["image"]) < len(plain["image"]) and len(batch["input_ids"]) < len(plain["input_ids"])
    results = []
    for inputs in (batch, plain):
        task.model.zero_grad()
        loss, _ = task.loss(task.model, inputs)
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in task.model.parameters() if p.requires_grad])
    for grouped, single in zip(*results, strict=True):
        torch.testing.assert_close(grouped, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        dict(mode="linear"),
        dict(mode="lora", target_modules=("text.q_proj", "text.v_proj")),
        dict(mode="lora", target_modules=("vision.q_proj", "vision.v_proj")),
    ],
)
def test_cached_features_give_the_same_losses_and_frozen_towers_run_once(folder, flags):
    plain, cached = task_of(folder, **flags), task_of(folder, cache_features=True, **flags)
    seen = counted(cached)
    for epoch in range(2):
        batches = plain.train_batches(epoch)
        pairs = zip(plain.train_loader(epoch, batches), cached.train_loader(epoch, batches), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(
                plain.loss(plain.model, one)[0], cached.loss(cached.model, other)[0], rtol=1e-5, atol=1e-6
            )
    if "vision" in cached.cache.towers:
        assert sum(seen) == 12


def test_caching_features_of_trained_towers_is_refused(folder):
    with pytest.raises(UserError, match="both towers are trained"):
        task_of(folder, cache_features=True)


def test_soft_targets_are_the_accuracy_that_each_answer_would_get():
    answers = Answers(["blue", "green", "red"], ["blue", "green", "red"])
    said = ("red",) * 3 + ("Blue",) * 2 + ("green",) + ("purple",) * 4
    target = SoftTargets(answers).target([Question(0, 0, "?", said, "purple")])
    assert target.tolist()[0] == pytest.approx([0.6, 0.3, 0.9])
    assert target.tolist()[0] == pytest.approx(
        [vqa_accuracy(name, [a.lower() for a in said]) for name in answers.labels]
    )


def test_soft_targets_train_on_binary_cross_entropy(folder, tmp_path):
    write_vqa(tmp_path, 6, 3, answers=10)
    task = task_of(str(tmp_path), soft_targets=True)
    (batch,) = task.train_loader(0, task.train_batches(0)[:1])
    loss, stats = task.loss(task.model, batch)
    logits, target = task.predictor.logits(task.model, batch), batch["target"]
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert target.max() == 1 and stats["count"] == len(batch["index"])


def test_answers_out_of_the_vocabulary_leave_training_and_count_as_wrong(folder):
    task = task_of(folder, num_answers=3)
    assert len(task.labels) == 3 and len(task.data["train"]) < 36 == task.asked
    found = task.predictions(task.model.eval(), "val")
    assert len(found.classes) == 18
    outside = (task.data["val"].labels < 0).sum()
    assert outside and np.isnan(found.loss).sum() == outside
    assert f"val: {outside} of 18 answers are out of the vocabulary" in "\n".join(task.data_lines())


@pytest.mark.parametrize("grouped", [True, False])
def test_a_step_asks_the_same_questions_in_one_batch_in_two_and_in_two_processes(folder, grouped):
    """Batches are cut by length, but for whole steps: what shares a step depends on the product of the three alone."""
    one, two = (task_of(folder, batch_size=size, group_by_image=grouped) for size in (8, 4))
    assert one.train_batches(3) == two.train_batches(3, 2) != two.train_batches(3)
    whole = share_steps(one.train_batches(3), 1)
    halves = share_steps(two.train_batches(3, 2), 2)
    for step, cut in zip(whole, halves, strict=True):
        assert step.batches == [sum(cut.batches, [])] and step.items == cut.items


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_are_the_same_bits_with_workers_and_after_a_stop(folder, grouped):
    flags = dict(group_by_image=grouped, augment="basic", seed=5)
    task, other = task_of(folder, **flags), task_of(folder, workers=2, **flags)
    batches = task.train_batches(1)
    whole = list(task.train_loader(1, batches))
    for first, start in ((whole, 0), (whole[2:], 2)):
        for one, two in zip(first, other.train_loader(1, batches[start:]), strict=True):
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    moved = next(iter(task.train_loader(2, batches)))
    assert not torch.equal(whole[0]["image"], moved["image"]), "another epoch, another crop"


def test_a_broken_picture_is_grey_and_not_learned_from(tmp_path):
    write_vqa(tmp_path, 4, 2)
    (tmp_path / "train" / "picture_000000000001.png").write_bytes(b"no picture")
    task = task_of(str(tmp_path), bad_data="skip", batch_size=64)
    (batch,) = task.train_loader(0, task.train_batches(0))
    broken = batch["picture"].tolist().index(1)
    assert batch["image"][broken].abs().sum() == 0
    assert (~batch["valid"]).sum() == 3 == (batch["image_index"] == broken).sum()
    assert task.loss(task.model, batch)[1]["count"] == 9
    with pytest.raises(UserError, match="picture_000000000001.png"):
        list(task_of(str(tmp_path)).train_loader(0, [[3, 4]]))


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(model="vit-nano-patch8-48"), "needs two towers"),
        (dict(weights="somewhere.safetensors"), "which tower is it for"),
        (dict(max_length=1000), "reads at most 128 tokens"),
        (dict(model={"text": "bert-base"}), "--tokenizer is missing"),
        (dict(data_format="visual7w"), "not for --task vqa"),
    ],
)
def test_wrong_flags_are_explained(folder, flags, message):
    with pytest.raises(UserError, match=message):
        task_of(folder, **flags)


def test_each_tower_gets_its_own_ranks_and_targets(folder):
    task = task_of(folder, lora_r={"vision": 2, "text": 6}, target_modules=("vision.q_proj", "text.v_proj"))
    shapes = {name: tuple(p.shape) for name, p in task.model.named_parameters() if "lora_A" in name}
    assert set(shapes.values()) == {(2, 128), (6, 128)}
    assert all(("vision" in name) == ("q_proj" in name) == (shape[0] == 2) for name, shape in shapes.items())


@pytest.mark.parametrize(
    "recipe, changes, trainable",
    [
        ("vqa-vit-bert", {}, 5_044_328),
        ("vqa-vit-bert", {"lora_r": 8}, 915_560),
        ("vqa-vit-bert-full", {}, 196_197_224),
        ("vqa-mobilenet-bert", {}, 16_261_994),
    ],
)
def test_recipes_train_what_the_reports_count(recipe, changes, trainable):
    config = Config(**read_recipe(recipe) | changes)
    with torch.device("meta"):
        model = create_model(config.model, num_classes=config.num_answers)
        if config.mode != "full":
            inject_lora(model, lora_config(config, model.head_modules))
    assert model.config.fusion == config.fusion
    assert count_parameters(model).trainable == trainable
    assert parse_args(["--recipe", recipe])[0].lr == config.lr


def test_bert_nanos_vocabulary_is_small_and_cuts_all_english():
    folder = bundled_weights("bert-nano")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size <= 4000 and sum(f.stat().st_size for f in folder.iterdir()) <= 4 * 2**20
    texts = [chr(code) for code in range(33, 127)] + ["Antidisestablishmentarianism (x^2 = ~4), isn't it?"]
    assert not any(tokenizer.vocab["[UNK]"] in tokenizer.encode(text) for text in texts)
    assert len(tokenizer.text_ids("what color is the triangle left of the star?")) == 10


def test_real_questions_have_no_unknown_token(shared):
    tokenizer = load_tokenizer(bundled_weights("bert-nano"))
    for name in ("easy_vqa", "daquar_small", "vqav2_small"):
        texts = {q.text for part in read_vqa2(shared / name).values() for q in part.questions}
        ids = [tokenizer.encode(text) for text in sorted(texts)]
        assert not any(tokenizer.vocab["[UNK]"] in row for row in ids)


def train(*words) -> None:
    assert program("train").main(["--task", "vqa", "--device", "cpu", *map(str, words)]) == 0


def test_train_and_evaluate_leave_what_a_vqa_run_needs(folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train("--data-dir", folder, "--weights", "none", "--epochs", 2, "--group-by-image", "--output", run_dir)
    names = {path.name for path in run_dir.iterdir()}
    assert {"labels.json", "vocab.txt", "adapter_model.safetensors", "report.html", "preprocess.json"} <= names
    evaluate, results, table = program("evaluate").main, tmp_path / "results.json", tmp_path / "out.csv"
    assert evaluate([str(run_dir), "--submission", str(results), "--predictions", str(table)]) == 0
    out = capsys.readouterr().out
    assert (
        "exact match after normalisation" in out and "picture greyed out" in out and "out of the vocabulary: 0" in out
    )
    page = (run_dir / "report.html").read_text()
    assert all(
        words in page for words in ("picture greyed out", "By question type", "Answers", "what is the color of it")
    )
    rows = json.loads(results.read_text())
    assert len(rows) == 18 and set(rows[0]) == {"question_id", "answer"}
    assert table.read_text().splitlines()[0].startswith("file,label,probability,label_2")
    picture = f"{folder}/val/picture_000000000000.png"
    assert evaluate([str(run_dir), "--image", picture, "--question", "What's the color of it?"]) == 0
    assert "%" in capsys.readouterr().out
    with pytest.raises(UserError, match="--question"):
        evaluate([str(run_dir), "--image", picture])
    run = load_run(run_dir)
    (answers,) = run.predict([picture], "what's the color of it?")
    assert abs(sum(p for _, p in run.predict([picture], "what is the color of it?", top_k=100)[0]) - 1) < 1e-5
    said = {row["question_id"]: row["answer"] for row in rows}
    assert answers[0][0] == said[0], "one question alone gets the answer that it got among others"


def test_questions_without_answers_get_predictions_and_a_results_file(folder, tmp_path, capsys):
    run_dir, data = tmp_path / "run", tmp_path / "data"
    train("--data-dir", folder, "--weights", "none", "--max-steps", 1, "--output", run_dir)
    questions, _ = records(3, start=5)
    write_json(data / "v2_OpenEnded_mscoco_test2015_questions.json", "questions", questions)
    write_pictures(data / "test2015", range(5, 8), "COCO_test2015_{:012d}.jpg")
    evaluate, results = program("evaluate").main, tmp_path / "results.json"
    assert evaluate([str(run_dir), "--data-dir", str(data), "--split", "test", "--submission", str(results)]) == 0
    assert "9 questions without answers" in capsys.readouterr().out
    assert [row["question_id"] for row in json.loads(results.read_text())] == [q["question_id"] for q in questions]


def test_dry_run_says_what_would_be_trained(folder, capsys):
    train("--data-dir", folder, "--weights", "none", "--dry-run")
    out = capsys.readouterr().out
    assert "train 36 questions on 12 pictures" in out and "guessed from the question alone" in out


@pytest.mark.parametrize("mode", ["full", "linear"])
def test_other_modes_come_back_from_their_run_directory(folder, tmp_path, mode):
    train("--data-dir", folder, "--weights", "none", "--mode", mode, "--max-steps", 2, "--output", tmp_path / "run")
    assert load_run(tmp_path / "run").config.mode == mode


def test_resumed_run_ends_with_the_same_bits(folder, tmp_path):
    flags = ["--data-dir", folder, "--weights", "none", "--batch-size", "8", "--epochs", "2", "--augment", "basic"]
    train(*flags, "--output", tmp_path / "whole")
    train(*flags, "--save-every", "1", "--output", tmp_path / "parts")
    steps = sorted((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    train("--resume", steps[0])
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.slow
def test_no_flags_learn_the_generated_scenes(tmp_path):
    train("--output", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"]["accuracy"] > 0.6


def test_a_new_run_writes_down_the_fusion_and_the_pooling_that_it_has(folder):
    task = task_of(folder, fusion=None)
    assert (task.config.fusion, task.config.text_pooling) == ("concat-product", "pooler")
    assert task.model.config.fusion == "concat-product" and task.model.text.pooler is not None
    student = build_task(
        Config(**SMALL | {"data_dir": folder, "model": "student-nano", "mode": "full", "fusion": None})
    )
    assert (student.config.fusion, student.config.text_pooling) == ("product", "pooler")


def test_text_pooling_is_trained_saved_and_opened_again(folder, tmp_path):
    run, words = tmp_path / "run", ["--task", "vqa", "--data-dir", folder, "--epochs", "1", "--batch-size", "8"]
    assert program("train").main([*words, "--text-pooling", "mean", "--output", str(run)]) == 0
    opened = load_run(run)
    assert opened.config.text_pooling == opened.model.text.config.pooling == "mean"
    assert opened.config.fusion == opened.model.config.fusion == "concat-product"
    ids = torch.tensor([[2, 9, 7, 3]])
    torch.testing.assert_close(opened.model.text.pooled(ids), opened.model.text.forward_features(ids).mean(1))


@pytest.mark.parametrize(
    "model, told", [({"text": "clip-nano"}, "clip-nano have one vector"), ("student-nano", "reads the last token")]
)
def test_a_text_tower_with_one_vector_refuses_a_pooling(folder, model, told):
    flags = {"model": model, "text_pooling": "mean", "fusion": None, "tokenizer": str(bundled_weights("bert-nano"))}
    with pytest.raises(UserError, match=told):
        task_of(folder, **flags | ({"mode": "full"} if model == "student-nano" else {}))


def test_what_version_0_1_did_not_write_down_means_what_it_did(tmp_path):
    """A run without the keys has the product and the pooler; for other tasks --fusion meant nothing."""
    told = '[base]\nweights = "none"\n'
    old = tmp_path / "config.toml"
    old.write_text(f'task = "vqa"\nmodel = "vqa-nano"\n{told}')
    config, _ = read_run_config(tmp_path)
    assert (config.fusion, config.text_pooling) == ("product", "pooler")
    old.write_text(f'task = "vqa"\nmodel = "vqa-nano"\nfusion = "concat"\ntext_pooling = "mean"\n{told}')
    config, _ = read_run_config(tmp_path)
    assert (config.fusion, config.text_pooling) == ("concat", "mean")
    old.write_text(f'task = "classify"\nmodel = "vit-nano-patch8-48"\nfusion = "product"\n{told}')
    assert parse_args(["--config", str(tmp_path)])[0].fusion is None
    old.write_text('task = "vqa"\n')  # flags that somebody wrote, not a run
    assert read_toml(old) == {"task": "vqa"}
