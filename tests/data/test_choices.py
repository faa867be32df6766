"""Multiple-choice data: Visual7W files, csv tables, their batches; and every kind of broken input by its one line."""

import json
import pickle

import numpy as np
import pytest
import torch

from minilora.data.choice_sets import load_choices
from minilora.data.pictures.images import BadImage
from minilora.data.pictures.loader import make_loader
from minilora.data.questions.choice_batches import ChoiceDataset, Tokens, choice_collate, collate_choices, shared_size
from minilora.data.questions.choices import LETTERS
from minilora.data.questions.visual7w import results
from minilora.errors import UserError
from reference_models.text_layers import pack_choices
from tests.support.choice_data import (
    HEADER,
    scpc_rows,
    visual7w,
    write_pictures,
    write_scpc,
    write_table,
    write_visual7w,
)

PREPROCESS = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "resize": "squash"}


def test_visual7w_candidates_are_the_answer_and_three_others_shuffled_by_the_seed(tmp_path):
    root = write_visual7w(tmp_path, visual7w(images=40))
    orders = []
    for seed in (1, 1, 2):
        splits = load_choices(root, seed=seed)
        for question in (*splits.train, *splits.val):
            assert question.choices[question.answer].startswith("Right")
            assert sorted(question.choices) == ["One.", f"Right {question.id // 10}.", "Three.", "Two."]
        orders.append([question.answer for question in (*splits.train, *splits.val)])
    assert orders[0] == orders[1] != orders[2]
    assert min(np.bincount(orders[0], minlength=4)) >= 8  # of 80; the right answer stands everywhere


def test_visual7w_order_of_a_question_does_not_depend_on_the_others(tmp_path):
    content = visual7w(images=6)
    whole = {q.id: q for q in load_choices(write_visual7w(tmp_path / "a", content), seed=3).val}
    content["images"] = content["images"][2:3] + content["images"][:2]
    part = load_choices(write_visual7w(tmp_path / "b", content), seed=3).val
    assert all(question.choices == whole[question.id].choices for question in part)


def test_visual7w_own_splits_and_types_are_kept(tmp_path):
    splits = load_choices(write_visual7w(tmp_path), val_split=0.5)
    assert [len(splits.train), len(splits.val), splits.test] == [8, 4, None]
    assert splits.train[0].kind == "who" and splits.train.path(0) == "images/p0.png"
    assert splits.train.load(0).size == (48, 48)


def test_visual7w_results_file_is_the_toolkits():
    split = load_choices(None).val.take([0])
    record = results(split, [[2, 0, 1, 3]])[0]
    assert record["qa_id"] == split[0].id and record["question"] == split[0].question
    assert [c["answer"] for c in record["candidates"]] == [split[0].choices[k] for k in (2, 0, 1, 3)]


def test_real_visual7w_has_its_own_splits_ids_and_types(shared):
    splits = load_choices(shared / "visual7w_small", seed=41)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [292, 64, 77]
    assert len({question.id for part in (splits.train, splits.val, splits.test) for question in part}) == 433
    assert {question.kind for question in splits.train} == {"who", "where", "when"}


def test_scpc_tables_with_byte_order_mark_and_quoted_commas(tmp_path):
    splits = load_choices(write_scpc(tmp_path), val_split=0.34, seed=1)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [8, 4, 6]
    question = splits.train[0]
    assert question.id.startswith("TRAIN_") and "What, if anything" in question.question
    assert question.choices[1] == "a dog, or two" and LETTERS[question.answer] in "ABCD"
    assert [q.id for q in splits.test] == [f"TEST_{i:03d}" for i in range(6)]
    assert all(q.answer == -1 for q in splits.test)


def test_a_split_by_pictures_divides_no_picture(tmp_path):
    root = write_scpc(tmp_path, train=40)
    for seed in range(5):
        splits = load_choices(root, val_split=0.15, seed=seed)
        train, val = ({q.picture for q in part} for part in (splits.train, splits.val))
        assert len(val) == 3 and not train & val and len(splits.train) + len(splits.val) == 40


def test_subset_counts_pictures_not_questions(tmp_path):
    root = write_scpc(tmp_path, train=40)
    for subset, pictures in ((0.5, 9), (3, 3)):
        splits = load_choices(root, val_split=0.1, subset=subset)
        assert len({q.picture for q in splits.train}) == pictures and len(splits.val) == 4


@pytest.mark.parametrize("count", [2, 5, 26])
def test_tables_of_2_to_26_choices(count, tmp_path):
    write_pictures(tmp_path, 2)
    header = ["id", "image", "question", *LETTERS[:count], "answer", "type"]
    rows = [
        [str(i), f"p{i}.png", "Which?", *map(str, range(count)), LETTERS[count - 1].lower(), "which"] for i in (0, 1)
    ]
    splits = load_choices(write_table(tmp_path / "all.csv", rows, header, bom=False))
    assert splits.whole[0].choices == tuple(map(str, range(count)))
    assert splits.whole[0].answer == count - 1 and splits.whole[0].kind == "which"


def test_a_split_column_divides_one_table(tmp_path):
    write_pictures(tmp_path / "img", 3)
    parts = ["train", "train", "validation", "train", "test", "test"]
    rows = [row + [part] for row, part in zip(scpc_rows(6), parts, strict=True)]
    splits = load_choices(write_table(tmp_path / "all.csv", rows, [*HEADER, "split"]))
    assert [len(splits.train), len(splits.val), len(splits.test), splits.whole] == [3, 1, 2, None]


def edited(row: int, column: int, value: str):
    rows = scpc_rows(4)
    rows[row][column] = value
    return HEADER, rows


def without(name: str):
    at = HEADER.index(name)
    return [h for h in HEADER if h != name], [row[:at] + row[at + 1 :] for row in scpc_rows(4)]


FEW = ["ID", "img_path", "Question", "A", "answer"]
MANY = ["ID", "img_path", "Question", *LETTERS, "AA", "answer"]
BROKEN_TABLES = {
    "missing column": (without("Question"), "the column Question is missing; the header has ID"),
    "missing picture column": (without("img_path"), "no picture column; the header has ID"),
    "no answers": (without("answer"), "no answer column"),
    "letter out of range": (edited(2, 7, "E"), "line 4: the answer 'E' is none of the letters A to D"),
    "word as answer": (edited(2, 7, "a cat"), "line 4: the answer 'a cat' is none of the letters"),
    "duplicate ID": (edited(3, 0, "TRAIN_001"), "line 5: ID 'TRAIN_001' is already on line 3"),
    "empty ID": (edited(3, 0, ""), "line 5: ID '' is empty"),
    "outside": (edited(1, 1, "../secret.png"), "line 3: the picture '../secret.png' lies outside the data folder"),
    "absolute": (edited(1, 1, "/etc/passwd"), "line 3: the picture '/etc/passwd' lies outside the data folder"),
    "empty choice": (edited(0, 5, " "), "line 2: choice C is empty"),
    "gap": (without("B"), "a column D but no column B"),
    "one choice": ((FEW, [["1", "p.png", "Q?", "x", "A"]]), "1 choice column;"),
    "27 choices": ((MANY, [["1", "p.png", "Q?", *"x" * 27, "A"]]), "more than 26 choice columns"),
    "no rows": ((HEADER, []), "no rows below the header"),
    "missing picture": (edited(1, 1, "img/none.png"), "1 of 3 pictures are not below"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_TABLES)
def test_a_broken_table_is_named_in_one_line(case, tmp_path):
    (header, rows), message = BROKEN_TABLES[case]
    write_pictures(tmp_path / "img", 2)
    write_table(tmp_path / "train.csv", rows, header)
    with pytest.raises(UserError) as error:
        load_choices(tmp_path, "scpc")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_link_that_leaves_the_folder_is_not_opened(tmp_path):
    root = write_scpc(tmp_path / "set", train=4, test=2)
    (tmp_path / "secret.png").write_bytes((root / "img/p0.png").read_bytes())
    (root / "img/p0.png").unlink()
    (root / "img/p0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadImage, match="outside the data folder"):
        load_choices(root).test.load(0)


def image(name="a.png", split="train", pairs=()):
    return {"images": [{"filename": name, "split": split, "qa_pairs": list(pairs)}]}


BROKEN_JSON = {
    "1 choice": (visual7w(multiple_choices=[]), "qa_id 0: 1 choice; a question needs 2 to 26"),
    "27 choices": (visual7w(multiple_choices=["x"] * 26), "qa_id 0: 27 choices; a question needs 2 to 26"),
    "empty choice": (visual7w(multiple_choices=["x", "", "y"]), "qa_id 0: choice C is empty"),
    "twice": (visual7w(qa_id=5), "qa_id 5 stands twice"),
    "pointing": (visual7w(answer=123), "pointing questions, whose answers are boxes"),
    "no answer": (image(pairs=[{"qa_id": 1, "question": "?"}]), "qa_id 1: the key 'answer' is missing"),
    "outside": (image("../a.png"), "lies outside the data folder"),
    "split": (image(split="trial"), "images[0]: split is 'trial'"),
    "another file": ({"questions": []}, "no list `images`"),
    "no questions": ({"images": []}, "no questions in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_broken_visual7w_file_is_named_in_one_line(case, tmp_path):
    content, message = BROKEN_JSON[case]
    (tmp_path / "dataset_v7w_telling.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_choices(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_formats_and_places_are_named(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    for path, fmt, message in (
        (tmp_path, "auto", "no csv table and no dataset_v7w_telling.json"),
        (tmp_path / "x.txt", "auto", "expected a folder with dataset_v7w_telling.json"),
        (tmp_path, "visual7w", "expected a folder with dataset_v7w_telling.json"),
        (tmp_path / "none", "auto", "no such folder or file"),
        (tmp_path, "vqa2", "not for --task choice"),
        (tmp_path, "shapes", "leave --data-dir out"),
    ):
        with pytest.raises(UserError, match=message):
            load_choices(path, fmt)


def dataset(root, **options) -> ChoiceDataset:
    split = load_choices(root, check_files=False).test
    rows = [[2, 5 + i, 6, 9 + c] + [3] * (1 + c % 2) for i in range(len(split)) for c in range(4)]
    return ChoiceDataset(split, Tokens(rows, 4), PREPROCESS, **options)


def test_a_batch_holds_each_picture_once_and_pads_to_its_longest_text(tmp_path):
    data = dataset(write_scpc(tmp_path))
    batch = collate_choices([data[i] for i in (0, 1, 4)], pad_id=7)
    assert batch["image"].shape == (2, 3, 32, 32) and batch["picture"].tolist() == [0, 0, 1]
    assert batch["input_ids"][1].tolist() == [
        [2, 6, 6, 9 + c] + [3] * (1 + c % 2) + [7] * (1 - c % 2) for c in range(4)
    ]
    assert batch["index"].tolist() == [0, 1, 4] and batch["label"].tolist() == [-1, -1, -1]
    alone = collate_choices([data[1]], pad_id=7)
    assert torch.equal(alone["image"][0], batch["image"][0])


def test_workers_give_the_same_bits_and_augmentation_follows_picture_and_epoch(tmp_path):
    data = dataset(write_scpc(tmp_path), augment="basic", seed=4)
    pickle.dumps((data, choice_collate(0)))  # as a spawned worker gets it
    keys = [[(1, 0), (1, 1), (1, 2)], [(1, 3), (1, 4), (1, 5)]]
    here, there = (list(make_loader(data, keys, workers, choice_collate(0))) for workers in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "input_ids", "picture", "index"))
    assert torch.equal(data[(1, 0)]["image"], data[(1, 1)]["image"])  # one picture, one crop
    assert not torch.equal(data[(1, 0)]["image"], data[(2, 0)]["image"])


def test_a_broken_picture_is_an_error_or_a_marked_row(tmp_path):
    root = write_scpc(tmp_path)
    (root / "img/p1.png").write_bytes(b"nothing")
    assert [dataset(root, bad_data="skip")[i]["valid"] for i in range(6)] == [True, True, False, False, True, True]
    with pytest.raises(BadImage, match="p1.png"):
        dataset(root)[2]


def test_shared_size_is_the_length_of_the_packed_row():
    generator = np.random.default_rng(0)
    for _ in range(20):
        texts = []
        for _ in range(3):
            head = generator.integers(10, 13, generator.integers(1, 6)).tolist()
            texts.append(
                [np.array(head + generator.integers(10, 13, generator.integers(0, 4)).tolist() + [3]) for _ in range(4)]
            )
        width = max(len(t) for text in texts for t in text)
        ids = torch.tensor([[t.tolist() + [0] * (width - len(t)) for t in text] for text in texts])
        packed = pack_choices(ids, (ids == 3).int().argmax(-1))
        assert packed.ids.shape[1] == shared_size(texts)
