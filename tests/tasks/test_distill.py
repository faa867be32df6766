"""Distillation: the loss against its definition, the teacher's pictures and answers, and every misfit named."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from minilora.compress.distill import distillation_loss, soft_divergence
from minilora.errors import UserError
from minilora.inject import count_parameters, lora_layers
from minilora.settings.parse import parse_args
from minilora.tasks import build_task, load_run
from minilora.tasks.teacher import teacher_names
from tests.support.choice_data import write_clip, write_scpc
from tests.support.cli_data import QUICK, program, write_photos
from tests.support.vqa_data import write_vqa

train = program("train")
HARD, SOFT = {"alpha": 0.9, "temperature": 15.0}, {"alpha": 0.25, "temperature": 3.0, "t2": True}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    """A LoRA run of a few steps."""
    path = tmp_path_factory.mktemp("runs") / "teacher"
    assert train.main([*QUICK, "--data-dir", str(photos), "--output", str(path), "--max-steps", "2"]) == 0
    return path


def student_of(photos, teacher, *words):
    words = [*QUICK, "--mode", "full", "--data-dir", str(photos), "--teacher", str(teacher), *words]
    return build_task(parse_args(words)[0])


def by_hand(student, teacher, labels, alpha, temperature, t2=False):
    """The definition, term by term and in plain sums."""
    total = torch.zeros((), dtype=student.dtype)
    for z, t, label in zip(student, teacher, labels, strict=True):
        p, q = torch.exp(t / temperature), torch.exp(z / temperature)
        p, q = p / p.sum(), q / q.sum()
        soft = sum(pk * (pk.log() - qk.log()) for pk, qk in zip(p, q, strict=True))
        hard = -(torch.exp(z) / torch.exp(z).sum())[label].log()
        total = total + alpha * hard + (1 - alpha) * soft * (temperature**2 if t2 else 1)
    return total / len(student)


@pytest.mark.parametrize("options", [HARD, SOFT, {"alpha": 0.0, "temperature": 1.0}], ids=["R5", "t2", "teacher"])
def test_value_and_gradient_are_those_of_the_definition(options):
    teacher, labels = torch.randn(6, 5, dtype=torch.double), torch.randint(5, (6,))
    student = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    counted = torch.ones(6, dtype=torch.bool)
    loss = distillation_loss(F.cross_entropy(student, labels), student, teacher, counted, **options)
    expected = by_hand(student, teacher, labels, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_divergence_of_equal_answers_is_zero_and_t2_is_a_factor():
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    torch.testing.assert_close(soft_divergence(student, student + 3, 2.0), torch.zeros(4), atol=1e-6, rtol=0)
    plain, squared = (soft_divergence(student, teacher, 15.0, t2) for t2 in (False, True))
    torch.testing.assert_close(225 * plain, squared)
    assert (plain > 0).all()


def test_report_5s_setting_leaves_the_teacher_a_thousandth_of_the_gradient():
    student, teacher = torch.randn(64, 10, requires_grad=True), 2 * torch.randn(64, 10)
    labels = torch.randint(10, (64,))
    hard = 0.9 * F.cross_entropy(student, labels)
    sizes = [torch.autograd.grad(hard, student)[0].norm()]
    for t2 in (False, True):
        soft = 0.1 * soft_divergence(student, teacher, 15.0, t2).mean()
        sizes.append(torch.autograd.grad(soft, student)[0].norm())
    assert sizes[1] < sizes[0] / 1000 and sizes[2] > sizes[0] / 20


def test_rows_that_do_not_count_and_choices_that_are_not_there_add_nothing():
    student = torch.randn(3, 4, requires_grad=True)
    teacher, counted = torch.randn(3, 4), torch.tensor([True, False, True])
    loss = distillation_loss(torch.zeros(()), student, teacher, counted, 0.0, 2.0)
    kept = distillation_loss(torch.zeros(()), student[::2], teacher[::2], counted[::2], 0.0, 2.0)
    torch.testing.assert_close(loss, kept)
    padded = [F.pad(x, (0, 2), value=-torch.inf) for x in (student, teacher)]
    same = distillation_loss(torch.zeros(()), *padded, counted, 0.0, 2.0)
    torch.testing.assert_close(same, loss)
    gradient = torch.autograd.grad(same, student)[0]
    assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_the_tasks_loss_is_the_definition_with_the_teachers_own_answers(photos, teacher):
    task = student_of(photos, teacher, "--distill-alpha", "0.3", "--distill-temperature", "4", "--distill-t2")
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    loss, stats = task.loss(task.model.eval(), batch)
    with torch.no_grad():
        answers = load_run(teacher).model(batch["image"])  # LoRA not merged
    expected = by_hand(task.model(batch["image"]), answers, batch["label"], 0.3, 4.0, True)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert stats["count"] == len(batch["label"])
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.run.model.parameters())
    assert not task.teacher.run.model.training and not list(lora_layers(task.teacher.run.model))


def test_answers_are_computed_once_where_pictures_do_not_change(photos, teacher):
    task = student_of(photos, teacher)
    calls = []
    task.teacher.run.model.register_forward_hook(lambda *_: calls.append(1))
    kept = []
    for epoch in (0, 1):
        for batch in task.train_loader(epoch, task.train_batches(epoch)):
            kept.append((batch, task.teacher.logits(batch)))
    assert len(calls) == 2  # 12 pictures, 8 at a time
    for batch, logits in kept:
        torch.testing.assert_close(logits, task.teacher.answer(batch))
    augmented = student_of(photos, teacher, "--augment", "basic")
    batch = next(iter(augmented.train_loader(1, augmented.train_batches(1))))
    assert torch.equal(augmented.teacher.logits(batch), augmented.teacher.answer(batch))
    assert augmented.teacher.kept is None


def test_the_teacher_sees_pictures_normalised_and_sized_as_its_own(photos, teacher):
    task = student_of(photos, teacher)
    picture = torch.rand(2, 3, 48, 48)
    here, there = {"mean": [0.5] * 3, "std": [0.25] * 3}, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    task.preprocess = task.preprocess | here
    task.teacher.run.preprocess = task.teacher.run.preprocess | there | {"image_size": 48}
    normalised = [(picture - torch.tensor(p["mean"])[:, None, None]) / torch.tensor(p["std"])[:, None, None]
                  for p in (here, there)]  # fmt: skip
    torch.testing.assert_close(task.teacher.picture(normalised[0]), normalised[1])
    task.teacher.run.preprocess["image_size"] = 24
    assert task.teacher.picture(normalised[0]).shape == (2, 3, 24, 24)


def test_a_student_runs_resumes_to_the_same_bits_and_needs_no_teacher_afterwards(photos, teacher, tmp_path):
    moved = shutil.copytree(teacher, tmp_path / "teacher")
    words = [*QUICK, "--mode", "full", "--data-dir", str(photos), "--teacher", str(moved), "--distill-t2"]
    assert train.main([*words, "--output", str(tmp_path / "whole"), "--save-every", "1"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "cut" / name).unlink()
    for step in (tmp_path / "cut/checkpoints").iterdir():
        if step.name != "step-5":
            shutil.rmtree(step)
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    sums = [json.loads((tmp_path / run / "summary.json").read_text())["weights_sha256"] for run in ("whole", "cut")]
    assert sums[0] == sums[1]
    shutil.rmtree(moved)
    assert load_run(tmp_path / "whole").labels == ["class_0", "class_1", "class_2"]


def edited(teacher, folder, change):
    """The teacher's run with another labels.json."""
    shutil.copytree(teacher, folder)
    names = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps({key: change(values) for key, values in names.items()}))
    return folder


def test_a_teacher_that_does_not_fit_is_named(photos, teacher, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        student_of(photos, tmp_path)
    other = edited(teacher, tmp_path / "classes", lambda names: ["cat", *names[1:]])
    with pytest.raises(UserError, match="trained on other classes: it does not know 'class_0'"):
        student_of(photos, other)
    task = shutil.copytree(teacher, tmp_path / "vqa")
    config = (task / "config.toml").read_text().replace('task = "classify"', 'task = "vqa"')
    (task / "config.toml").write_text(config)
    with pytest.raises(UserError, match="is a run of --task vqa; this one is --task classify"):
        student_of(photos, task)
    with pytest.raises(UserError, match="use one of the two"):
        student_of(photos, teacher, "--mode", "linear", "--cache-features")
    with pytest.raises(UserError, match="--distill-alpha needs --teacher"):
        parse_args(["--distill-alpha", "0.5"])


VQA = ["--task", "vqa", "--device", "cpu", "--batch-size", "8", "--max-length", "24"]
STUDENT = [*VQA, "--model", "student-nano", "--mode", "full"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_vqa(tmp_path_factory.mktemp("vqa"), train=6, val=2)


@pytest.fixture(scope="module")
def vqa_teacher(questions, tmp_path_factory):
    """Two towers with LoRA after two steps."""
    path = tmp_path_factory.mktemp("runs") / "pair"
    words = [*VQA, "--data-dir", str(questions), "--max-steps", "2", "--output", str(path)]
    assert train.main(words) == 0
    return path


def student_words(teacher, *words):
    data = load_run(teacher).config.data_dir
    return [*STUDENT, "--data-dir", data, "--teacher", str(teacher), *words]


def vqa_student(teacher, *words):
    return build_task(parse_args(student_words(teacher, *words))[0])


def test_a_student_of_questions_learns_from_two_towers_and_takes_their_answers(vqa_teacher, tmp_path):
    task = vqa_student(vqa_teacher, "--distill-alpha", "0.5", "--distill-temperature", "2")
    run = load_run(vqa_teacher)
    assert task.labels == run.labels and task.tokenizer.vocab == run.tokenizer.vocab
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    loss, _ = task.loss(task.model.eval(), batch)
    logits = task.predictor.logits(task.model, batch)
    seen = batch | {"image": (batch["image"] * 0.5 + 0.5 - mean(run)) / std(run)}
    with torch.no_grad():
        answers = run.logits(seen)
    torch.testing.assert_close(loss, by_hand(logits, answers, batch["label"], 0.5, 2.0), rtol=1e-4, atol=1e-5)
    assert train.main(student_words(vqa_teacher, "--max-steps", "1", "--output", str(tmp_path / "run"))) == 0
    assert load_run(tmp_path / "run").labels == run.labels


def mean(run):
    return torch.tensor(run.preprocess["mean"])[:, None, None]


def std(run):
    return torch.tensor(run.preprocess["std"])[:, None, None]


def test_a_teacher_with_other_answers_or_tokens_is_refused(vqa_teacher, tmp_path):
    run = load_run(vqa_teacher)
    other = edited(vqa_teacher, tmp_path / "answers", lambda names: ["cat", *names[1:]])
    with pytest.raises(UserError, match=f"trained on other answers: it does not know '{run.keys[0]}'"):
        vqa_student(other)
    with pytest.raises(UserError, match=f"has {len(run.keys)} answers, but --num-answers is 3"):
        vqa_student(vqa_teacher, "--num-answers", "3")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*run.tokenizer.tokens, "unheard"]) + "\n")
    with pytest.raises(UserError, match="reads other tokens than this model"):
        vqa_student(vqa_teacher, "--tokenizer", str(vocab))
    with pytest.raises(UserError, match="is a run of --task vqa; this one is --task classify"):
        build_task(parse_args([*QUICK, "--teacher", str(vqa_teacher)])[0])
    with pytest.raises(UserError, match="learns each answer for itself"):
        vqa_student(vqa_teacher, "--soft-targets")
    with pytest.raises(UserError, match="joins its towers by --fusion product"):
        vqa_student(vqa_teacher, "--fusion", "concat")


def test_a_subset_of_the_teachers_data_may_lack_and_rank_answers_otherwise(vqa_teacher):
    config, _ = parse_args(student_words(vqa_teacher))
    keys = ["an answer that is rare in the whole"]
    with pytest.raises(UserError, match="it does not know"):
        teacher_names(config, keys)
    config.subset = 6.0
    assert teacher_names(config, keys)["keys"] == load_run(vqa_teacher).keys


def test_answers_too_many_to_keep_are_asked_anew(vqa_teacher, monkeypatch):
    monkeypatch.setattr("minilora.tasks.teacher.CACHE_BYTES", 100)
    task = vqa_student(vqa_teacher)
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    assert torch.equal(task.teacher.logits(batch), task.teacher.answer(batch)) and not len(task.teacher.kept)


def test_recipe_is_report_5s_student(questions, vqa_teacher):
    config, _ = parse_args(["--recipe", "vqa-student", "--teacher", str(vqa_teacher)])
    assert (config.distill_alpha, config.distill_temperature, config.distill_t2) == (0.9, 15.0, False)
    assert (config.batch_size, config.epochs, config.opt, config.lr) == (64, 10, "adam", 1e-3)
    words = ["--recipe", "vqa-student", "--data-dir", str(questions), "--max-length", "24"]
    task = build_task(parse_args([*words, "--tokenizer", str(vqa_teacher)])[0])
    task.model.reset_classifier(10)
    assert count_parameters(task.model).trainable == 14_775_626


def test_choices_are_distilled_too(tmp_path):
    clip, data = write_clip(tmp_path / "clip"), write_scpc(tmp_path / "scpc")
    words = ["--task", "choice", "--model", str(clip), "--data-dir", str(data), "--batch-size", "4"]
    words += ["--max-steps", "1", "--device", "cpu"]
    assert train.main([*words, "--output", str(tmp_path / "teacher")]) == 0
    words += ["--teacher", str(tmp_path / "teacher")]
    task = build_task(parse_args([*words, "--distill-alpha", "0.4", "--distill-temperature", "3"])[0])
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    loss, _ = task.loss(task.model.eval(), batch)
    run = load_run(tmp_path / "teacher")
    with torch.no_grad():
        logits, answers = task.predictor.logits(task.model, batch), run.logits(batch)
    torch.testing.assert_close(loss, by_hand(logits, answers, batch["label"], 0.4, 3.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="was trained with --prompt None"):
        build_task(parse_args([*words, "--prompt", "{question} {choice}"])[0])
