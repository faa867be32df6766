"""--distill-unlabelled: which rows are taken, how batches mix them in, the loss by its definition, the same bits."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch

from minilora.commands import shards
from minilora.compress.distill import certain, distillation_loss
from minilora.data.unlabelled import mixed_batches, mixed_counts
from minilora.errors import UserError
from minilora.settings.parse import parse_args
from minilora.tasks import build_task, load_run
from minilora.training import distributed
from minilora.training.state import tensors_sha256
from tests.programs.test_torchrun import STEPS, distance, torchrun, without
from tests.support.tiny_tasks import evaluate, run_quickly, train, write_tasks
from tests.support.vqa_data import records, write_json, write_pictures
from tests.tasks.test_distill import by_hand
from tests.tasks.test_resume import resumed_equals_whole

ALONE = ["--distill-alpha", "0.3", "--distill-temperature", "4", "--unlabelled-share", "0.5"]
TASKS = ("classify", "vqa")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """{task: its flags, a teacher of one step and unlabelled rows with them}; the teacher knows the labelled part."""
    root = tmp_path_factory.mktemp("tasks")
    found = write_tasks(root)
    pictures = root / "more"
    write_pictures(pictures, range(20, 27), size=20)
    questions = root / "questions"
    write_json(questions / "train_questions.json", "questions", records(4, 20)[0])
    write_pictures(questions / "train", range(20, 24), size=20)
    with pytest.MonkeyPatch.context() as patch:
        for task, more in (("classify", pictures), ("vqa", questions)):
            run_quickly([*found[task], "--max-steps", "1", "--output", root / f"{task}-teacher"], patch)
            found[task] += ["--teacher", str(root / f"{task}-teacher"), "--distill-unlabelled", str(more)]
    return found


def build(words, *more):
    return build_task(parse_args([*map(str, (*words, *more))])[0])


def after(words, flag, value) -> list[str]:
    """The words with another value of a flag."""
    place = words.index(flag)
    return [*words[: place + 1], str(value), *words[place + 2 :]]


def value_of(words, flag) -> str:
    return words[words.index(flag) + 1]


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("size, share", [(8, 0.75), (5, 0.5), (7, 0.1), (6, 0.99), (2, 0.5)])
def test_an_epoch_passes_once_over_the_unlabelled_and_equally_often_over_the_labelled(size, share):
    labelled, more = 10, 53
    counts = mixed_counts(size, share)
    seen, order = Counter(), set()
    for epoch in range(9):
        batches = mixed_batches(lambda u: [[*range(i, min(i + u, more))] for i in range(0, more, u)],
                                labelled, more, counts, seed=3, epoch=epoch)  # fmt: skip
        numbers = [number for batch in batches for number in batch]
        rows = [number % (labelled + more) for number in numbers]
        assert sorted(row for row in rows if row >= labelled) == [*range(labelled, labelled + more)]
        assert len(set(numbers)) == len(numbers), "a labelled row that comes again in an epoch has a number of its own"
        kinds = [sum(number % (labelled + more) < labelled for number in batch) for batch in batches]
        assert {(few, len(batch) - few) for few, batch in zip(kinds[:-1], batches[:-1], strict=True)} <= {counts}
        assert 0 < len(batches[-1]) <= size
        seen.update(row for row in rows if row < labelled)
        order.add(tuple(row for row in rows if row < labelled))
    assert max(seen.values()) - min(seen[row] for row in range(labelled)) <= 1
    assert len(order) == 9, "another order in each epoch"


def test_both_kinds_are_in_every_microbatch():
    for epoch in range(2):
        batches = mixed_batches(lambda u: [[*range(12)], [*range(12, 24)]], 5, 24, (4, 12), seed=0, epoch=epoch)
        for batch in batches:
            for part in (batch[i : i + 4] for i in range(0, 16, 4)):
                assert sum(number % 29 < 5 for number in part) == 1


def test_a_step_has_room_for_one_of_each():
    assert mixed_counts(32, 0.75) == (8, 24) and mixed_counts(3, 0.01) == (2, 1) and mixed_counts(2, 0.99) == (1, 1)
    with pytest.raises(UserError, match="--batch-size 1 has no room"):
        mixed_counts(1, 0.5)


# --------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("flags", [[], ["--distill-t2"], ["--distill-hard"]], ids=["soft", "t2", "hard"])
def test_the_loss_is_the_mean_over_rows_of_both_kinds(tasks, task, flags):
    """alpha CE + (1 - alpha) D of a labelled row, T^2 D of another; the teacher is asked here on its own."""
    words = [word for word in ALONE if "--distill-hard" not in flags or word not in ("--distill-temperature", "4")]
    made = build(tasks[task], *words, *flags, "--batch-size", "8")
    batch = next(iter(made.train_loader(0, made.train_batches(0))))
    new = batch["label"] < 0
    assert 0 < new.sum() < len(new) and torch.equal(new, batch["index"] >= made.rows()["train"])
    loss, stats = made.loss(made.model.eval(), batch)
    student = made.predictor.logits(made.model, batch)
    run = load_run(value_of(tasks[task], "--teacher"))
    with torch.no_grad():
        answers = run.logits(batch)
    best = answers.argmax(-1)
    rows = []
    for z, t, label, k in zip(student, answers, batch["label"].tolist(), best.tolist(), strict=True):
        if "--distill-hard" in flags:
            hard = -z.log_softmax(-1)[k]
            rows.append(hard if label < 0 else 0.3 * -z.log_softmax(-1)[label] + 0.7 * hard)
        elif label < 0:
            rows.append(by_hand(z[None], t[None], [0], 0.0, 4.0, True))
        else:
            rows.append(by_hand(z[None], t[None], [label], 0.3, 4.0, "--distill-t2" in flags))
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=1e-4, atol=1e-5)
    assert stats["count"] == (~new).sum()
    trained = [p for p in made.model.parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(x, trained) for x in (loss, torch.stack(rows).mean()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in got) > 1e-3


def test_a_certain_teacher_gives_the_cross_entropy_of_its_best_answer():
    student = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    teacher, counted = torch.randn(5, 4, dtype=torch.double), torch.ones(5, dtype=torch.bool)
    loss = distillation_loss(torch.zeros(()), student, certain(teacher), counted, 0.0, 1.0)
    expected = torch.nn.functional.cross_entropy(student, teacher.argmax(-1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_accumulated_microbatches_and_two_processes_give_the_step_of_the_whole_batch(tasks, monkeypatch):
    """Each cut as the trainer cuts it, weighted as it weights."""
    made = build(tasks["classify"], *ALONE, "--batch-size", "8", "--distill-t2", "--amp", "fp32")
    parameters = [p for p in made.model.eval().parameters() if p.requires_grad]
    whole = made.train_batches(0)[0]

    def gradient(parts, weights):
        total = [torch.zeros_like(p) for p in parameters]
        for part, weight in zip(parts, weights, strict=True):
            (batch,) = made.train_loader(0, [part])
            found = torch.autograd.grad(made.loss(made.model, batch)[0] * weight, parameters)
            total = [a + b for a, b in zip(total, found, strict=True)]
        return torch.cat([g.flatten() for g in total])

    expected = gradient([whole], [1.0])
    assert expected.norm() > 0
    (step,) = distributed.share_steps([whole], 4)
    torch.testing.assert_close(gradient(step.batches, step.weights), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        (step,) = distributed.share_steps([whole], 1)
        shares.append(gradient(step.batches, step.weights))
    torch.testing.assert_close(sum(shares) / 2, expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- rows


def test_labelled_rows_and_their_crops_are_those_of_the_run_without(tasks):
    """What comes first is not changed by what is added."""
    words = tasks["classify"]
    plain = build(words[: words.index("--teacher")], "--augment", "basic")
    made = build(words, "--augment", "basic")
    n = made.rows()["train"]
    assert n == len(plain.data["train"]) and made.rows()["unlabelled"] == 7
    for key in ((2, 0), (2, n - 1)):
        one, two = plain.data["train"][key], made.data["train"][key]
        assert one["label"] == two["label"] >= 0 and torch.equal(one["image"], two["image"])
    more = made.data["train"][(2, n)]
    assert more["label"] == -1 and more["valid"] and not torch.equal(more["image"], made.data["train"][(3, n)]["image"])


@pytest.mark.parametrize("task", TASKS)
def test_a_labelled_row_that_comes_again_in_an_epoch_is_augmented_anew(tasks, task):
    made = build(tasks[task], "--augment", "basic", "--unlabelled-share", "0.1", "--batch-size", "8")
    n, total = made.rows()["train"], len(made.data["train"])
    numbers = sorted(number for batch in made.train_batches(0) for number in batch)
    again = next(number for number in numbers if number >= total)
    assert again % total < n
    one, two = (next(iter(made.train_loader(0, [[number]]))) for number in (again % total, again))
    assert torch.equal(one["index"], two["index"]) and torch.equal(one["label"], two["label"])
    assert not torch.equal(one["image"], two["image"])


@pytest.mark.parametrize("task", TASKS)
def test_answers_of_both_kinds_are_computed_once(tasks, task):
    made = build(tasks[task], "--unlabelled-share", "0.3")
    calls = []
    made.teacher.run.model.register_forward_hook(lambda *_: calls.append(1))
    for epoch in (0, 1):
        for batch in made.train_loader(epoch, made.train_batches(epoch)):
            kept = made.teacher.logits(batch)
            count = len(calls)
            torch.testing.assert_close(kept, made.teacher.answer(batch))
            del calls[count:]
    assert len(calls) == -(-len(made.data["train"]) // (2 * made.config.batch_size))


def test_class_folders_as_unlabelled_rows_lose_their_labels_and_what_the_run_has_itself(tasks, tmp_path):
    """The whole of a set as DIR: its val part is left out, and of train what is labelled here."""
    words = tasks["classify"]
    data = value_of(words, "--data-dir")
    made = build(after(words, "--distill-unlabelled", data), "--shots", "2")
    assert made.rows() == {"train": 6, "unlabelled": 9, "val": 6}
    lines = made.data_lines()
    assert re.search(r"6 train, 6 val, 9 unlabelled pictures, 3 classes", lines[0])
    assert f"9 rows of {data}/train; the labels there are not read; 6 more left out" in lines[1]
    items = [made.data["train"][i] for i in range(15)]
    assert [item["label"] for item in items[6:]] == [-1] * 9
    assert len({made.file_of(row) for row in range(15)}) == 15
    held = after(after(words, "--distill-unlabelled", f"{data}/train"), "--data-dir", f"{data}/train")
    held = build(held, "--shots", "2", "--val-split", "0.4")  # no parts: val is drawn out of the folder
    assert held.rows() == {"train": 6, "val": 6, "unlabelled": 3}


def test_pictures_come_from_a_table_a_part_or_loose_ones_too(tasks, tmp_path):
    words, folder = tasks["classify"], tmp_path / "set"
    write_pictures(folder / "train", range(3), "{}.png", size=20)
    write_pictures(folder / "val", range(3, 5), "{}.png", size=20)
    rows = {"folder": folder, "loose": folder / "train"}
    for name, header, label in (("bare", "file", ""), ("labelled", "file,label", ",cat")):
        rows[name] = folder / f"{name}.csv"
        rows[name].write_text("\n".join([header, *(f"train/{i}.png{label}" for i in range(2))]) + "\n")
    for name, path in rows.items():
        made = build(after(words, "--distill-unlabelled", path))
        assert made.rows()["unlabelled"] == (2 if "csv" in str(path) else 3)
        assert ("labels there are not read" in made.data_lines()[1]) == (name == "labelled")


def test_questions_need_no_annotations_and_those_that_lie_there_are_not_read(tasks, tmp_path):
    words = tasks["vqa"]
    made = build(words)
    assert made.rows() == {"train": 15, "val": 6, "unlabelled": 12}
    assert "unlabelled 12 questions on 4 pictures" in made.data_lines()[0]
    assert made.data["train"].labels[15:].tolist() == [-1] * 12
    assert not any("labels" in line for line in made.data_lines())
    batch = made.data["train"][(None, [0, 15])]  # a picture of each side
    assert batch["image"].shape[0] == 2 and not torch.equal(batch["image"][0], batch["image"][1])
    data = value_of(words, "--data-dir")
    whole = build(after(words, "--distill-unlabelled", data), "--subset", "2")
    assert whole.rows() == {"train": 6, "val": 6, "unlabelled": 9}
    assert any("train_questions.json; the labels there are not read; 6 more left out" in x for x in whole.data_lines())
    copy = shutil.copytree(data, tmp_path / "vqa")
    for file in [*copy.glob("train_*.json"), *copy.glob("val_annotations.json")]:
        file.unlink()
    other = build(after(words, "--distill-unlabelled", copy))
    assert other.rows()["unlabelled"] == 6, "of another folder, whatever its name"


@pytest.mark.parametrize("task", TASKS)
def test_shards_of_both_give_the_batches_of_the_files(tasks, task, tmp_path):
    words = [*tasks[task], "--augment", "none"]
    data, model = value_of(words, "--data-dir"), words[words.index("--model") + 1 : words.index("--data-dir")]
    assert shards.main([data, str(tmp_path / "all"), "--task", task, "--model", *model]) == 0
    few = ["--subset", "2"] if task == "vqa" else ["--shots", "2"]
    stored = after(after(words, "--data-dir", tmp_path / "all"), "--distill-unlabelled", tmp_path / "all")
    one = build(after(words, "--distill-unlabelled", data), *few)
    two = build(stored, *few)
    assert one.rows() == two.rows() and one.train_batches(1) == two.train_batches(1)
    batches = one.train_batches(1)
    for a, b in zip(one.train_loader(1, batches), two.train_loader(1, batches), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert (a["label"] < 0).any()
    with pytest.raises(UserError, match="files and shards do not mix"):
        build(after(words, "--distill-unlabelled", tmp_path / "all"))
    with pytest.raises(UserError, match="files and shards do not mix"):
        build(after(words, "--data-dir", tmp_path / "all"))


def test_shards_that_were_made_otherwise_are_refused(tasks, tmp_path):
    words = tasks["classify"]
    data, model = value_of(words, "--data-dir"), value_of(words, "--model")
    for name, wide in (("one", "20"), ("two", "24")):
        assert shards.main([data, str(tmp_path / name), "--model", model, "--wide", wide]) == 0
    words = after(after(words, "--data-dir", tmp_path / "one"), "--distill-unlabelled", tmp_path / "two")
    with pytest.raises(UserError, match="shards made in two ways"):
        build(words, "--shots", "2")


# ----------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("task", TASKS)
def test_resume_at_every_step_is_bit_equal(tasks, task, tmp_path, monkeypatch):
    words = [*tasks[task], *ALONE, "--augment", "basic", "--grad-accum-steps", "2", "--lora-dropout", "0.3"]
    words += ["--epochs", "2", "--lr", "0.05", "--save-every", "2"]
    words += ["--group-by-image"] if task == "vqa" else ["--distill-t2"]
    assert resumed_equals_whole(words, tmp_path, monkeypatch) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one_with_the_doubled_batch(tasks, task, tmp_path):
    words = [
        *without(tasks[task], "--batch-size", "--device", "--log-interval"),
        *STEPS,
        *ALONE,
        "--epochs",
        "2",
        "--amp",
        "fp32",
    ]
    words += ["--fusion", "concat"] if task == "vqa" else []  # product has dropout of its own
    done = torchrun([*words, "--batch-size", 4, "--output", tmp_path / "two"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert train.main([*map(str, words), "--batch-size", "8", "--output", str(tmp_path / "one")]) == 0
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-6
    losses = [[json.loads(line)["train_loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("one", "two")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_a_run_says_how_many_rows_of_each_kind_it_had(tasks, tmp_path, capsys):
    words = [*tasks["classify"], *ALONE, "--epochs", "1", "--output", str(tmp_path / "run")]
    assert train.main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "15 train, 6 val, 7 unlabelled pictures" in said
    assert "; 2 of 3 rows in a step have no label, but the teacher's answer alone, times 16; an epoch is one" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows"] == {"train": 15, "val": 6, "unlabelled": 7}
    assert "15 train, 6 val, 7 unlabelled pictures" in (tmp_path / "run" / "README.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>15</b><span>labelled rows</span>" in page and "<b>7</b><span>unlabelled rows</span>" in page
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert tensors_sha256(load_run(tmp_path / "run").model.state_dict())  # opened without DIR's help
    pruned = ["--prune", "0.5", "--prune-scope", "units", "--prune-epochs", "1"]  # and learned on, from the labels
    assert evaluate.main([str(tmp_path / "run"), *pruned]) == 0


def test_a_moved_folder_is_named_anew(tasks, tmp_path, monkeypatch):
    words = tasks["classify"]
    first = shutil.copytree(value_of(words, "--distill-unlabelled"), tmp_path / "first")
    words = [*after(words, "--distill-unlabelled", first), "--output", tmp_path / "run"]
    run_quickly([*words, "--epochs", "1"], monkeypatch)
    second = first.rename(tmp_path / "second")
    run_quickly(["--resume", tmp_path / "run", "--epochs", "2", "--distill-unlabelled", second], monkeypatch)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--distill-unlabelled more", "--distill-unlabelled needs --teacher RUN"),
        ("--distill-hard", "--distill-hard needs --teacher RUN"),
        ("--teacher t --unlabelled-share 0.5", "it needs --distill-unlabelled DIR"),
        ("--teacher t --distill-unlabelled m --unlabelled-share 1", "--unlabelled-share must be a number above 0 and"),
        ("--teacher t --distill-hard --distill-temperature 2", "--distill-temperature has no effect with"),
        ("--teacher t --distill-hard --distill-t2", "--distill-t2 has no effect with --distill-hard"),
        ("--task choice --teacher t --distill-unlabelled m", "belongs to --task classify and --task vqa"),
        ("--teacher t --distill-unlabelled m --shots 1 --steps-per-shot 9", "both say how long an epoch is"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, told):
    with pytest.raises(UserError) as error:
        parse_args(flags.split())
    assert told in str(error.value)


def test_a_toml_file_without_a_teacher_is_refused_too(tmp_path):
    (tmp_path / "c.toml").write_text('distill_unlabelled = "more"\n')
    with pytest.raises(UserError, match="--distill-unlabelled needs --teacher"):
        parse_args(["--config", str(tmp_path / "c.toml")])


def test_a_folder_without_rows_is_named(tasks, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("file,label\n")
    (tmp_path / "gone.csv").write_text("file\nnone.png\n")
    (tmp_path / "questions").mkdir()
    for task, name, told in (
        ("classify", "nowhere", "nowhere: no such folder or file"),
        ("classify", "empty", "empty: no pictures in this folder"),
        ("classify", "table.csv", "no unlabelled row; nothing is there"),
        ("classify", "gone.csv", "1 of 1 pictures are not below"),
        ("vqa", "nowhere", "nowhere: no such folder or file"),
        ("vqa", "empty", "no questions here"),
        ("vqa", "table.csv", "no questions here"),
    ):
        with pytest.raises(UserError) as error:
            build(after(tasks[task], "--distill-unlabelled", tmp_path / name))
        assert str(error.value).startswith("--distill-unlabelled: ") and told in str(error.value), (task, name)
    data = value_of(tasks["classify"], "--data-dir")
    with pytest.raises(UserError, match="no unlabelled row; all 15 are in this run's own data"):
        build(after(tasks["classify"], "--distill-unlabelled", data))


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_of_other_classes_is_refused(tasks, task, tmp_path):
    other = shutil.copytree(value_of(tasks[task], "--teacher"), tmp_path / "other")
    names = json.loads((other / "labels.json").read_text())
    (other / "labels.json").write_text(json.dumps({key: ["cat", *values[1:]] for key, values in names.items()}))
    with pytest.raises(UserError, match="trained on other (classes|answers): it does not know"):
        build(after(tasks[task], "--teacher", other))


def test_a_broken_unlabelled_picture_ends_the_run_or_is_left_out(tasks, tmp_path, monkeypatch):
    words = tasks["classify"]
    folder = shutil.copytree(value_of(words, "--distill-unlabelled"), tmp_path / "more")
    next(folder.iterdir()).write_bytes(b"no picture")
    words = [*after(words, "--distill-unlabelled", folder), *ALONE, "--epochs", "1"]
    made = build(words, "--bad-data", "skip", "--batch-size", "40")
    (batch,) = made.train_loader(0, made.train_batches(0))
    assert (~batch["valid"]).sum() == 1 and made.loss(made.model, batch)[0].isfinite()
    with pytest.raises(UserError, match="picture_"):
        run_quickly([*words, "--output", tmp_path / "run"], monkeypatch)
