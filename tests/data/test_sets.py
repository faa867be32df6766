"""Class folders and tables: what is found, how it is numbered and split, and what is refused in one line."""

import csv
import json
import os
import random
import time
from collections import Counter

import pytest
from PIL import Image

from minilora.data.pictures.tables import contained, read_rows
from minilora.data.sets import load_classification, unlabelled
from minilora.errors import UserError


def make_folders(root, parts, per_class=6, classes=("b", "a", "c")):
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                Image.new("RGB", (4, 4)).save(root / part / name / f"{part.strip(chr(46))}{i}.png")
    return root


def make_table(path, rows, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    for row in rows[1:]:
        (path.parent / row[0]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path.parent / row[0])
    return path


def labels(split):
    return [sample.label for sample in split]


def test_folders_are_numbered_in_sorted_order(tmp_path):
    splits = load_classification(make_folders(tmp_path, ("train", "val", "test")))
    assert splits.classes == ["a", "b", "c"]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [18, 18, 18]
    assert splits.train[0] == ("train/a/train0.png", 0) and splits.test[17] == ("test/c/test5.png", 2)
    assert splits.val.load(3).size == (4, 4)


@pytest.mark.parametrize(
    "content, names, keys",
    [
        (
            {"a": {"name": "ant", "imagenet_index": 5}, "b": {"name": "bee"}, "z": {}},
            ["ant", "bee", "c"],
            ["a", "b", "c"],
        ),
        ({"a": "ant", "b": "bee", "c": "bee"}, ["ant", "bee (b)", "bee (c)"], ["a", "b", "c"]),
        (["c", "a", "b"], ["c", "a", "b"], ["c", "a", "b"]),
        (["ant", "bee", "cat"], ["ant", "bee", "cat"], ["a", "b", "c"]),
    ],
)
def test_classes_json_names_the_classes(tmp_path, content, names, keys):
    (make_folders(tmp_path, ("train",)) / "classes.json").write_text(json.dumps(content))
    splits = load_classification(tmp_path)
    assert (splits.classes, splits.keys) == (names, keys)
    for sample in splits.train:
        assert sample.path.split("/")[1] == keys[sample.label]


@pytest.mark.parametrize("content", ["{", "3", '["one"]', "[" * 100_000])
def test_unusable_classes_json_is_a_user_error(tmp_path, content):
    (make_folders(tmp_path, ("train",)) / "classes.json").write_text(content)
    with pytest.raises(UserError, match="classes.json"):
        load_classification(tmp_path)


def test_validation_is_held_out_per_class_and_by_seed(tmp_path):
    make_folders(tmp_path, ("train",), per_class=10)
    first, again = load_classification(tmp_path, val_split=0.3), load_classification(tmp_path, val_split=0.3)
    other = load_classification(tmp_path, val_split=0.3, seed=1)
    assert Counter(labels(first.val)) == {0: 3, 1: 3, 2: 3} and len(first.train) == 21
    assert list(first.val) == list(again.val) != list(other.val)
    assert set(first.train).isdisjoint(first.val)


@pytest.mark.parametrize("subset, per_class", [(1.0, 10), (0.5, 5), (0.01, 1), (6, 2), (900, 10)])
def test_subset_keeps_a_share_or_a_number_of_every_class(tmp_path, subset, per_class):
    make_folders(tmp_path, ("train", "val"), per_class=10)
    splits = load_classification(tmp_path, subset=subset)
    assert Counter(labels(splits.train)) == {0: per_class, 1: per_class, 2: per_class}
    assert len(splits.val) == 30


def test_class_folders_without_train_are_train(tmp_path):
    splits = load_classification(make_folders(tmp_path, (".",)))
    assert splits.train[0].path.startswith("a/") and len(splits.val) == 3


def test_numbering_of_an_earlier_run_is_kept(tmp_path):
    make_folders(tmp_path, ("val",), classes=("c", "a"))
    splits = load_classification(tmp_path, classes=["c", "x", "a"], require_train=False)
    assert splits.train is None and set(labels(splits.val)) == {0, 2}
    assert all(("c", "x", "a")[sample.label] == sample.path.split("/")[1] for sample in splits.val)
    with pytest.raises(UserError, match="'c' is not a class of this run"):
        load_classification(tmp_path, classes=["a", "x"], require_train=False)
    with pytest.raises(UserError, match="no training pictures"):
        load_classification(tmp_path)


def test_folder_errors_name_what_is_wrong(tmp_path):
    for argument, message in ((None, "--data-dir is missing"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=message):
            load_classification(argument)
    with pytest.raises(UserError, match="no class folders"):
        load_classification(tmp_path)
    make_folders(tmp_path, ("train",), classes=("a",))
    with pytest.raises(UserError, match="only one class"):
        load_classification(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="empty: class folder without a picture"):
        load_classification(tmp_path)
    (tmp_path / "train" / "empty").rmdir()
    make_folders(tmp_path, ("train", "val"), classes=("b", "c"))
    os.rename(tmp_path / "val" / "b", tmp_path / "val" / "unknown")
    with pytest.raises(UserError, match="'unknown' is not among the training classes"):
        load_classification(tmp_path)


@pytest.mark.parametrize("options", [{"fmt": "zip"}, {"val_split": 1.0}, {"val_split": 0.0}, {"subset": 0}])
def test_impossible_options_are_user_errors(tmp_path, options):
    make_folders(tmp_path, ("train",))
    with pytest.raises(UserError):
        load_classification(tmp_path, **options)


def test_links_out_of_the_folder_are_refused_and_loops_end(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    make_folders(data, ("train",))
    make_folders(outside, (".",))
    os.symlink(data / "train", data / "train" / "a" / "loop")
    assert len(load_classification(data, val_split=0.5).train) > 0
    os.symlink(outside / "a", data / "train" / "a" / "away")
    with pytest.raises(UserError, match="away: link to outside"):
        load_classification(data)
    os.unlink(data / "train" / "a" / "away")
    os.symlink(outside / "a" / "0.png", data / "train" / "a" / "file.png")
    with pytest.raises(UserError, match="file.png: link to outside"):
        load_classification(data)


def test_hidden_and_foreign_files_are_not_pictures(tmp_path):
    make_folders(tmp_path, ("train", "val"), per_class=1)
    for name in ("._train0.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / "train" / "a" / name).write_text("x")
    (tmp_path / "train" / "a" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "a" / "deeper" / "X.PNG")
    assert [s.path for s in load_classification(tmp_path).train if s.label == 0] == [
        "train/a/deeper/X.PNG",
        "train/a/train0.png",
    ]


def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        folder = tmp_path / "train" / name
        (folder / "0.jpg").touch()
        for i in range(1, 50_000):  # hard links are made faster than files, and are listed alike
            os.link(folder / "0.jpg", folder / f"{i}.jpg")
    start = time.perf_counter()
    splits = load_classification(tmp_path)
    assert (len(splits.train), len(splits.val)) == (90_000, 10_000)
    assert time.perf_counter() - start < 10


def test_imagewoof_is_read_as_it_is(shared):
    splits = load_classification(shared / "imagewoof224")
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (1200, 400, 10)
    assert splits.classes[0] == "Shih-Tzu" and splits.info[splits.keys[0]]["imagenet_index"] == 155


# Tables


def test_train_val_test_tables(tmp_path):
    for part, n in (("train", 6), ("val", 4), ("test", 2)):
        rows = [["file", "label"]] + [[f"{part}/{i}.png", str(i % 2 * 10 + 1)] for i in range(n)]
        make_table(tmp_path / f"{part}.csv", rows)
    splits = load_classification(tmp_path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 4, 2]
    assert splits.classes == ["1", "11"] and labels(splits.train) == [0, 1] * 3


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path):
    make_table(tmp_path / "a.csv", [["file", "label"]] + [[f"{i}.png", str(i // 2)] for i in range(24)])
    assert load_classification(tmp_path).classes == [str(i) for i in range(12)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "header", [["path", "noisy_labels_0", "noisy_labels_1", "is_valid"], ["IMG_PATH", "Class", "x", "is_valid"]]
)
def test_imagewoof_table_with_is_valid(tmp_path, encoding, header):
    rows = [[f"train/n{i % 2}/{i}.JPEG", f"n{i % 2}", "n9", str(i >= 8)] for i in range(12)]
    splits = load_classification(make_table(tmp_path / "noisy_imagewoof.csv", [header, *rows], encoding))
    assert (len(splits.train), len(splits.val), splits.classes) == (8, 4, ["n0", "n1"])
    assert splits.val.load(0).size == (4, 4)


def test_split_column_quoted_commas_semicolons_and_blank_lines(tmp_path):
    rows = [
        ["filename", "label", "split"],
        ["a, b.png", "dog, small", "train"],
        ["c.png", "cat", "valid"],
        ["d.png", "cat", "train"],
    ]
    make_table(tmp_path / "t.csv", rows)
    assert load_classification(tmp_path).classes == ["cat", "dog, small"]
    (tmp_path / "t.csv").write_text("file;label\n\nc.png;x\n\nd.png;y\n")
    header, read = read_rows(tmp_path / "t.csv")
    assert header == ["file", "label"] and [line for line, _ in read] == [3, 5]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the table is empty"),
        ("file,label\n", "no rows below the header"),
        ("name,label\na.png,x\n", "no picture column; the header has name, label"),
        ("file,kind\na.png,x\n", "no label column"),
        ("file,label\na.png,x,y\n", "line 2: 3 fields, the header has 2"),
        ("file,label\na.png,\n", "line 2: the label is empty"),
        ("file,label\n,x\n", "line 2: the picture's path"),
        ("file,label\na.png,x\na.png,y\n", "line 3: a.png stands twice"),
        ("file,label\n../a.png,x\n", "lies outside the data folder"),
        ("file,label\n/etc/a.png,x\n", "lies outside the data folder"),
        ("file,label\nC:\\a.png,x\n", "lies outside the data folder"),
        ("file,label\nsub\\..\\..\\a.png,x\n", "lies outside the data folder"),
        ("file,label\na.png,x\nb.png,x\n", "only one class"),
        ("file,label,is_valid\na.png,x,maybe\n", "is_valid is 'maybe'"),
        ("file,label,split\na.png,x,dev\n", "split is 'dev'"),
        ("file,label\nmissing1.png,x\nmissing2.png,y\n", "2 of 2 pictures are not below"),
        ("file,label,is_valid\na.png,x,0\nb.png,y,0\nc.png,z,1\n", "unknown label 'z' of c.png"),
        ('file,label\n"a.png,x\n', "not a readable table"),
        ("file,label,label\na.png,x,y\n", "a column name stands twice"),
    ],
)
def test_table_errors_name_line_and_column(tmp_path, text, message):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_classification(tmp_path / "t.csv", val_split=0.5)
    assert "t.csv" in str(caught.value) or str(tmp_path) in str(caught.value)


def test_broken_bytes_are_user_errors(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"file,label\n\xff\xfe.png,x\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_classification(tmp_path)
    (tmp_path / "t.csv").write_text("file,label\n" + "a" * 200_000 + ",x\n")
    with pytest.raises(UserError, match="not a readable table"):
        load_classification(tmp_path)


@pytest.mark.parametrize("cases", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_tables_and_class_names_are_read_or_refused_in_one_line(tmp_path, cases):
    rng = random.Random(0)
    table = b'file,label,is_valid\n"a, 1.png",x,0\nb.png,y,False\nc/\xc3\xa9.png,y,True\n'
    names = json.dumps({"x": {"name": "ex"}, "y": "why", "\u00e9": {"name": "e"}}).encode()
    (tmp_path / "data").mkdir()
    before, refused = set(tmp_path.iterdir()), 0
    for _ in range(cases):
        for name, content in (("t.csv", table), ("classes.json", names)):
            damaged = bytearray(content)
            for _ in range(rng.choice((0, 1, 1, 2, 8))):
                place = rng.randrange(len(damaged))
                damaged[place : place + rng.choice((0, 1, 5))] = rng.choice(
                    (b"", b'"', b",", b"\n", b"\0", b"\xff", b"{[")
                )
            (tmp_path / "data" / name).write_bytes(damaged)
        try:
            splits = load_classification(tmp_path / "data", val_split=0.5, check_files=False)
            assert all(0 <= sample.label < len(splits.classes) for sample in splits.train)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert cases / 4 < refused < cases and set(tmp_path.iterdir()) == before


def test_several_tables_ask_which(tmp_path):
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("file,label\n")
    with pytest.raises(UserError, match="one.csv, two.csv"):
        load_classification(tmp_path)


def test_a_link_in_a_table_that_leaves_the_folder_is_never_opened(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    make_table(data / "t.csv", [["file", "label"]] + [[f"{name}.png", "xy"[i % 2]] for i, name in enumerate("abcd")])
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    os.unlink(data / "a.png")
    os.symlink(tmp_path / "secret.png", data / "a.png")
    splits = load_classification(data / "t.csv", val_split=0.5)
    split = splits.train if any(s.path == "a.png" for s in splits.train) else splits.val
    with pytest.raises(UserError, match="outside the data folder"):
        split.load([s.path for s in split].index("a.png"))


def test_a_path_of_a_table_becomes_relative_with_forward_slashes():
    assert contained("./a/./b.png", "here") == contained("a\\b.png", "here") == "a/b.png"


# Without labels


def test_unlabelled_pictures_are_sorted_and_keep_the_order_of_a_table(tmp_path):
    make_folders(tmp_path, ("x",), per_class=2, classes=("b", "a"))
    assert [s.path for s in unlabelled(tmp_path)] == ["x/a/x0.png", "x/a/x1.png", "x/b/x0.png", "x/b/x1.png"]
    assert [s.label for s in unlabelled(tmp_path)] == [-1] * 4
    (tmp_path / "test.csv").write_text("ID,img_path\n1,x/b/x0.png\n2,x/none.png\n3,x/b/x0.png\n")
    assert [s.path for s in unlabelled(tmp_path / "test.csv")] == ["x/b/x0.png", "x/none.png", "x/b/x0.png"]
    assert unlabelled(tmp_path / "x" / "a" / "x0.png").load(0).size == (4, 4)
    with pytest.raises(UserError, match="no pictures"):
        (tmp_path / "empty").mkdir()
        unlabelled(tmp_path / "empty")
