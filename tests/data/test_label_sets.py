"""Tables with several labels for a picture: every form gives the same Splits, and what is unclear is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from minilora.data.pictures.label_sets import strata
from minilora.data.pictures.loader import collate
from minilora.data.sets import load_classification, stratified
from minilora.errors import UserError
from tests.support.label_data import write_scenes


def table(root, text, name="t.csv"):
    for picture in ("a.png", "b.png", "c.png", "d.png"):
        Image.new("RGB", (4, 4)).save(root / picture)
    (root / name).write_text(text)
    return root / name


def read(path, **options):
    return load_classification(path, several=True, **{"val_split": 0.4} | options)


def labels_of(splits) -> dict[str, set[str]]:
    """{file: the names of its labels} over all parts."""
    samples = [sample for part in (splits.train, splits.val, splits.test) for sample in part or ()]
    return {path: {splits.classes[k] for k, there in enumerate(code) if there} for path, code in samples}


@pytest.mark.parametrize("form", ["|", ",", " ", "columns", "json"])
def test_every_form_of_a_table_says_the_same(tmp_path, form):
    wanted, splits = read(write_scenes(tmp_path / "a")), read(write_scenes(tmp_path / "b", form))
    assert splits.classes == wanted.classes and len(wanted.classes) == 12
    assert labels_of(splits) == labels_of(wanted)
    assert {len(labels) for labels in labels_of(wanted).values()} == {0, 2, 3, 4}
    assert (len(splits.train), len(splits.val)) == (24, 12)


@pytest.mark.parametrize(
    "cells, wanted, said",
    [
        (["golden retriever;cat", "cat;", "", "cat"], [{"golden retriever", "cat"}, {"cat"}, set(), {"cat"}], "';'"),
        (["big cat|dog", "dog", "", "big cat"], [{"big cat", "dog"}, {"dog"}, set(), {"big cat"}], "'|'"),
        (["3 14", "14", "3", ""], [{"3", "14"}, {"14"}, {"3"}, set()], "spaces"),
        (["['x', 'y']", "['x']", "[]", "['y']"], [{"x", "y"}, {"x"}, set(), {"y"}], "','"),
        (["x", "y", "", "x"], [{"x"}, {"y"}, set(), {"x"}], "whole cells"),
        (["x;x", "y;x", " y ; x ", ""], [{"x"}, {"x", "y"}, {"x", "y"}, set()], "';'"),
    ],
)
def test_the_separator_is_found_and_named(tmp_path, cells, wanted, said):
    rows = "".join(f'{name}.png,"{cell}"\n' for name, cell in zip("abcd", cells, strict=True))
    splits = read(table(tmp_path, "file,labels\n" + rows))
    assert labels_of(splits) == {f"{name}.png": labels for name, labels in zip("abcd", wanted, strict=True)}
    none, each = sum(not labels for labels in wanted), sum(map(len, wanted)) / 4
    assert splits.notes[0].startswith(f"labels from {said}, ") and splits.notes[0].endswith(f"{none} with none")
    assert f"{each:.2f} for each" in splits.notes[0]


def test_columns_of_0_and_1_are_classes_also_one_that_no_picture_has(tmp_path):
    text = "image,width,cat,dog,owl,is_valid\na.png,64,1,0,0,0\nb.png,80,1.0,1,0,0\nc.png,64,0,0,0,0\nd.png,1,0,1,0,1\n"
    splits = read(table(tmp_path, text))
    assert splits.classes == ["cat", "dog", "owl"]
    assert labels_of(splits) == {"a.png": {"cat"}, "b.png": {"cat", "dog"}, "c.png": set(), "d.png": {"dog"}}
    assert len(splits.val) == 1 and "t.csv: pictures from 'image', labels from 'cat' and 2 others; not read: width" in (
        splits.notes
    )


@pytest.mark.parametrize(
    "text, told",
    [
        ("file,cat,dog\na.png,1,0\nb.png,2,1\nc.png,1,1\nd.png,1,1\n", "no labels column"),
        ("file,cat,dog\na.png,1,0\nb.png,0,1\nc.png,1,1\nd.png,1,-1\n", "line 5: dog is '-1'; every row needs 0 or 1"),
        ("file,cat,dog\na.png,1,0\nb.png,,1\nc.png,1,1\nd.png,1,1\n", "line 3: cat is ''"),
        ("file,kind\na.png,1\nb.png,0\n", "no labels column; the header has file, kind"),
        ("file,labels\na.png,x;y\nb.png,x|y\n", "labels stand between '|', but 'x;y' has ';'; use one"),
        ("file,labels\na.png,\nb.png,\n", "no picture has a label"),
        ("file,labels\na.png,x\na.png,y\n", "line 3: a.png stands twice"),
        ("file,labels,split\na.png,x;y,train\nb.png,x,train\nc.png,z,val\n", "unknown label 'z' of c.png in val"),
    ],
)
def test_what_is_unclear_in_a_table_is_refused_with_its_place(tmp_path, text, told):
    with pytest.raises(UserError) as error:
        read(table(tmp_path, text))
    assert told in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", "[1, 2]", '[{"file": "a.png"}, 3]', '[{"file": {"a": 1}}]'])
def test_json_that_is_no_table_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"t\.json"):
        read(table(tmp_path, content, "t.json"))


def test_json_is_a_table_of_one_label_too(tmp_path):
    rows = [{"file": f"{name}.png", "label": label} for name, label in zip("abcd", ["big cat", "dog"] * 2, strict=True)]
    splits = load_classification(table(tmp_path, json.dumps(rows), "t.json"), val_split=0.5)
    assert splits.classes == ["big cat", "dog"] and len(splits.train) == len(splits.val) == 2
    rows[0]["label"] = ["big cat"]
    assert load_classification(table(tmp_path, json.dumps(rows), "t.json"), val_split=0.5).classes == splits.classes
    rows[0]["label"] = ["big cat", "dog"]
    with pytest.raises(UserError, match="'big cat, dog' is several labels in one cell; .* or --multi-label"):
        load_classification(table(tmp_path, json.dumps(rows), "t.json"), val_split=0.5)


@pytest.mark.parametrize(
    "text", ["file,label\na.png,x;y\nb.png,x\n", "file,tags\na.png,x y\nb.png,x\n", "file,x,y\na.png,1,0\nb.png,1,1\n"]
)
def test_without_the_flag_a_table_of_several_labels_is_refused_with_its_name(tmp_path, text):
    with pytest.raises(UserError, match="--multi-label"):
        load_classification(table(tmp_path, text), val_split=0.5)


def test_class_folders_shapes_and_missing_tables_are_refused(tmp_path):
    for name in ("x", "y"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "folders" / name / "a.png")
    for place, fmt in ((tmp_path / "folders", "auto"), (tmp_path / "folders", "folder"), (None, "shapes")):
        with pytest.raises(UserError, match="--multi-label: .* have one label for each picture; name a table"):
            read(place, fmt=fmt)


def test_rare_labels_are_held_out_too_and_the_seed_decides(tmp_path):
    splits = read(write_scenes(tmp_path, train=200, val=0), val_split=0.2)
    hot = np.array([list(code) for _, code in splits.val])
    assert hot.any(0).all() and 30 <= len(splits.val) <= 50 and (hot.sum(1) == 0).any()
    codes = [bytes(row) for row in ([1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1])]
    assert strata(codes).tolist() == [1, 0, -1, 2]
    again = stratified(splits.train, lambda n: n // 2, 1)[0]
    assert again == stratified(splits.train, lambda n: n // 2, 1)[0] != stratified(splits.train, lambda n: n // 2, 2)[0]


def test_a_run_numbers_the_labels_of_other_data_as_its_own(tmp_path):
    path = table(tmp_path, "file,labels,split\na.png,owl;cat,train\nb.png,,train\nc.png,cat,val\n")
    splits = read(path, classes=["bee", "cat", "dog", "owl"])
    assert splits.classes == ["bee", "cat", "dog", "owl"]
    assert labels_of(splits) == {"a.png": {"owl", "cat"}, "b.png": set(), "c.png": {"cat"}}
    with pytest.raises(UserError, match="class 'owl' is not a class of this run"):
        read(path, classes=["bee", "cat"])


def test_a_batch_has_a_row_of_0_and_1_for_each_picture():
    batch = collate([{"label": bytes([1, 0, 1])}, {"label": bytes([0, 0, 0])}])
    assert batch["label"].tolist() == [[1, 0, 1], [0, 0, 0]]
