"""Data folders and tables as people bring them: parts by their usual names, and nothing left out in silence."""

import os
import unicodedata

import pytest
from PIL import Image

from minilora.data.pictures.parts import find_parts, part_of
from minilora.data.pictures.tables import read_tables
from minilora.data.questions.vqa2 import read_vqa2
from minilora.data.sets import load_classification, unlabelled
from minilora.errors import UserError
from tests.support.vqa_data import records, write_json, write_pictures


def pictures(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="PNG")
    return root


def two_classes(root, *folders, each=4):
    for folder in folders:
        pictures(root, *(f"{folder}/{name}/{i}.png" for name in "ab" for i in range(each)))
    return root


def table(root, text, *names):
    pictures(root, *names)
    (root / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / "t.csv"


def lengths(splits):
    return [None if part is None else len(part) for part in (splits.train, splits.val, splits.test)]


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("Training", None, "Testing"),
        ("train", "valid", None),
        ("TRAIN", "Validation", "TEST"),
        ("seg_train", None, "seg_test"),
        ("training_set", "valid_set", "test_set"),
        ("my-pets-train", "my-pets-val", "my-pets-test"),
        ("train2014", "val2014", None),
    ],
)
def test_parts_are_found_under_their_usual_names(tmp_path, train, val, test):
    found = load_classification(two_classes(tmp_path, *filter(None, (train, val, test))))
    assert found.classes == ["a", "b"]
    assert lengths(found) == [6 if val is None else 8, 2 if val is None else 8, test and 8]
    assert found.train[0].path.startswith(f"{train}/a/") and found.train.load(0).size == (4, 4)
    assert any(f"train from {train}/" in note for note in found.notes) == (train != "train")


def test_a_part_folder_inside_a_folder_of_its_own_name_is_that_part(tmp_path):
    two_classes(tmp_path, "seg_train/seg_train", "seg_test/seg_test")
    found = load_classification(pictures(tmp_path, "seg_pred/seg_pred/1.png"))
    assert lengths(found) == [6, 2, 8] and found.train[0].path.startswith("seg_train/seg_train/a/")
    assert any("1 pictures beside the parts (seg_pred/)" in note for note in found.notes)


def test_two_folders_of_one_part_are_refused(tmp_path):
    with pytest.raises(UserError, match="valid and validation are both the val part"):
        load_classification(two_classes(tmp_path, "train", "valid", "validation"))


def test_words_that_hold_a_parts_name_are_no_parts():
    for name in ("brain", "terrain", "valley", "interval", "contest", "restraint", "train_test"):
        assert part_of(name) is None, name
    assert find_parts(["bullet_train", "bus"], ".") == {} and find_parts(["test1", "val2"], ".") == {}
    assert find_parts(["train", "test", "a_train", "a_val"], ".") == {"train": "train", "test": "test"}


def test_a_folder_named_like_a_part_without_class_folders_is_a_class_beside_others(tmp_path):
    found = load_classification(pictures(tmp_path, *(f"{c}/{i}.png" for c in ("bus", "Train", "car") for i in "012")))
    assert found.classes == ["Train", "bus", "car"] and "Train: no class folders in it" in found.notes[0]
    with pytest.raises(UserError, match="no class folders"):
        load_classification(pictures(tmp_path / "loose", "train/1.png", "testing/2.png"))


def test_pictures_outside_the_parts_and_the_classes_are_counted(tmp_path):
    two_classes(tmp_path, "train")
    pictures(tmp_path, "bus/1.png", "bus/2.png", "train/loose.png", "top.png", "test/1.png", "train/a/deep/1.png")
    (tmp_path / "val").mkdir()
    found = load_classification(tmp_path)
    assert lengths(found) == [7, 2, None]
    notes = "; ".join(found.notes)
    for said in (
        "3 pictures beside the parts (bus/)",
        "2 pictures outside class folders",
        "1 folders without pictures",
    ):
        assert said in notes
    assert "1 pictures lie in folders below a class folder and count for it (train/a/deep/1.png)" in notes


def test_parts_one_folder_deeper_are_named(tmp_path):
    with pytest.raises(UserError, match="one folder deeper; give --data-dir .*archive"):
        load_classification(two_classes(tmp_path, "archive/Training", "archive/Testing"))


def test_what_storage_boxes_and_systems_leave_is_never_a_class(tmp_path):
    junk = ("@eaDir", "__MACOSX", ".thumbnails", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information")
    two_classes(tmp_path, "train")
    for folder in junk:
        pictures(tmp_path, f"train/{folder}/1.png", f"train/a/{folder}/1.png", f"{folder}/1.png")
    pictures(tmp_path, "train/a/._1.png")
    found = load_classification(tmp_path)
    assert found.classes == ["a", "b"] and lengths(found) == [6, 2, None]
    assert any(f"{3 * len(junk) + 1} hidden or of the system" in note for note in found.notes)


def test_jfif_is_read_and_what_is_not_read_is_counted_by_extension(tmp_path):
    two_classes(tmp_path, "train")
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "a" / "x.jfif", format="JPEG")
    for name in ("1.HEIC", "2.heic", "3.CR2", "notes.txt", "README"):
        (tmp_path / "train" / "b" / name).write_text("x")
    found = load_classification(tmp_path)
    (sample,) = [i for i, one in enumerate(found.train) if one.path.endswith("jfif")]
    assert found.train.load(sample).size == (4, 4)
    for said in ("2 .heic files (train/b/1.HEIC)", "1 .cr2 files", "1 .txt files", "1 files without extension"):
        assert said in found.notes[-1]
    assert "2 .heic files" in unlabelled(tmp_path).notes[0]


def test_class_names_are_compared_in_one_unicode_form(tmp_path):
    accented, apart = (unicodedata.normalize(form, "Björn é") for form in ("NFC", "NFD"))
    pictures(tmp_path, *(f"train/{accented}/{i}.png" for i in "01"), "train/b/1.png", f"val/{apart}/9.png")
    (tmp_path / "classes.json").write_text(f'{{"{apart}": "{apart}!"}}')
    found = load_classification(tmp_path)
    assert found.classes == [f"{accented}!", "b"] and found.val[0].label == 0 and found.val.load(0).size == (4, 4)
    again = load_classification(tmp_path, classes=["b", f"{apart}!"])
    assert again.val[0].label == 1
    text = f"file,label,split\nx.png,{accented},train\ny.png,b,train\n{apart}.png,{apart},val\n"
    found = load_classification(table(tmp_path / "t", text, "x.png", "y.png", f"{accented}.png"))
    assert len(found.classes) == 2 and found.val[0].label == found.classes.index(accented)
    assert found.val.load(0).size == (4, 4)


# Tables


@pytest.mark.parametrize(
    "text",
    [
        "file,label,,\na.png,x,,\nb.png,y,,\n",
        "file,label\na.png,x,,\nb.png,y\n",
        "sep=;\nfile;label\na.png;x\nb.png;y\n",
        '\ufeff"sep=|"\r\nfile|label\r\na.png|x\r\nb.png|y\r\n',
        "sep=\t\nfile\tlabel\na.png\tx\nb.png\ty\n",
        "\ufefffile\tlabel\na.png\tx\nb.png\ty\n".encode("utf-16-le"),
        "image_id,label\na.png,x\nb.png,y\n",
        "id,breed\na,x\nb,y\n",
        "Image ID,Class\na,x\nb,y\n",
        ",file_name,label,,\n0,a.png,x,,\n1,b.png,y,,\n",
    ],
)
def test_tables_as_spreadsheets_and_competitions_write_them(tmp_path, text):
    found = read_tables(table(tmp_path, text, "a.png", "b.png"))
    assert found.classes == ["x", "y"] and list(found.train) == [("a.png", 0), ("b.png", 1)]


def test_ids_and_names_find_their_pictures_in_folders_below(tmp_path):
    text = "id,label\nk1,x\nimages/k2,y\nk3.png,y\n"
    found = read_tables(table(tmp_path, text, "images/k1.png", "images/k2.png", "more/k3.png"))
    assert [s.path for s in found.train] == ["images/k1.png", "images/k2.png", "more/k3.png"]
    with pytest.raises(UserError, match="'k1' may be images/k1.png or more/k1.jpg"):
        read_tables(table(tmp_path, text, "more/k1.jpg"))
    os.unlink(tmp_path / "more" / "k1.jpg")
    with pytest.raises(UserError, match="line 4: images/k1.png stands twice"):
        read_tables(table(tmp_path, "id,label\nk1,x\nk2,y\nimages/k1.png,y\n"))
    with pytest.raises(UserError, match="1 of 2 pictures are not below .*other/k1.png"):
        read_tables(table(tmp_path, "id,label\nother/k1.png,x\nk2,y\n"))


def test_absolute_paths_inside_the_data_folder_are_relative(tmp_path):
    data, link = tmp_path / "data", tmp_path / "link"
    data.mkdir()
    link.symlink_to(data)
    for root in (data, link):
        text = f"path,label\n{data}/i/a.png,x\n{root}/./i//b.png,y\n"
        assert [s.path for s in read_tables(table(root, text, "i/a.png", "i/b.png")).train] == ["i/a.png", "i/b.png"]
    for outside in (f"{tmp_path}/data2/a.png", f"{data}/../secret.png", "/data/a.png"):
        with pytest.raises(UserError, match="lies outside the data folder"):
            read_tables(table(data, f"path,label\n{outside},x\n"))


@pytest.mark.parametrize(
    "cells",
    [
        ["cat dog", "cat", "dog"],
        ["cat|dog", "bird"],
        ["cat;dog", "bird"],
        ["cat,dog", "dog", "cat", "bird"],
        ["cat, dog", "dog, cat"],
        ["['cat', 'dog']", "['bird']"],
        ["clear primary", "haze", "clear primary water", "haze primary", "water haze"],
        ["0 1 0", "1 0 0", "1 1 0", "0 0 1"],
        ["dog+cat", "dog", "cat"],
    ],
)
def test_several_labels_in_a_cell_are_refused(tmp_path, cells):
    rows = "".join(f'{i}.png,"{cell}"\n' for i, cell in enumerate(cells))
    with pytest.raises(UserError, match="several labels in one cell; one label per row is needed"):
        read_tables(table(tmp_path, f"file,label\n{rows}", *(f"{i}.png" for i in range(len(cells)))))


@pytest.mark.parametrize(
    "cells",
    [
        ["golden retriever", "labrador retriever", "poodle"],
        ["red apple", "green apple", "red pepper", "green pepper"],
        ["tench, Tinca tinca", "missile", "projectile, missile"],
        ["polar bear", "bear", "n/a"],
        ["10", "2", "0"],
    ],
)
def test_names_of_several_words_are_classes(tmp_path, cells):
    rows = "".join(f'{i}.png,"{cell}"\n' for i, cell in enumerate(cells))
    found = read_tables(table(tmp_path, f"file,label\n{rows}", *(f"{i}.png" for i in range(len(cells)))))
    assert sorted(found.classes) == sorted(cells)
    doubtful = [note for note in found.notes if "is one class, though" in note]
    assert len(doubtful) == len({"bear", "missile"} & set(cells))


def test_a_table_without_its_columns_says_what_they_may_be_called(tmp_path):
    for text, kind, name in (("who,label\n1,x\n", "picture", "image_id"), ("id,x\n1,x\n", "label", "category")):
        with pytest.raises(UserError, match=f"t.csv: no {kind} column; .* may be called .*{name}"):
            read_tables(table(tmp_path, text))
    found = read_tables(table(tmp_path, "age,path,label,class\n3,a.png,x,1\n", "a.png"))
    assert found.notes == ["t.csv: pictures from 'path', labels from 'label'; not read: age, class"]


def test_a_split_column_counts_in_a_table_of_any_name_and_under_usual_names(tmp_path):
    rows = "a.png,x,train\nb.png,y,Training\nc.png,y,Valid\nd.png,x,testing\n"
    names = [f"{name}.png" for name in "abcd"]
    for column in ("split", "data set", "Partition"):
        assert lengths(read_tables(table(tmp_path, f"file,label,{column}\n{rows}", *names))) == [2, 1, 1]
    (tmp_path / "t.csv").rename(tmp_path / "train.csv")
    assert lengths(read_tables(tmp_path)) == [2, 1, 1]
    found = read_tables(table(tmp_path, "file,label,set\na.png,x,7\nb.png,y,8\n"))
    assert lengths(found) == [2, None, None] and "not read: set" in found.notes[0]


def test_tables_are_found_by_the_same_names_as_folders(tmp_path):
    for name in ("pets_Training", "pets_valid"):
        (tmp_path / f"{name}.csv").write_text(f"file,label\n{name}1.png,x\n{name}2.png,y\n")
        pictures(tmp_path, f"{name}1.png", f"{name}2.png")
    (tmp_path / "pets_testing.tsv").write_text("file\tx\na.png\t1\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n1,x\n")
    found = load_classification(tmp_path)
    assert lengths(found) == [2, 2, None]
    notes = "; ".join(found.notes)
    assert "pets_testing.tsv: no label column, its 1 rows" in notes and "not read: sample_submission.csv" in notes
    text = "file,label\npets_valid1.png,x\npets_valid2.png,y\n"
    (tmp_path / "kaggle" / "train").mkdir(parents=True)
    (tmp_path / "kaggle" / "sample_submission.csv").write_text("id,beagle,pug\n1,.5,.5\n")
    found = read_tables(table(tmp_path / "kaggle", text, "train/pets_valid1.png", "train/pets_valid2.png").parent)
    assert lengths(found) == [2, None, None] and found.notes == ["tables not read: sample_submission.csv"]


def test_a_table_that_is_none_of_pictures_does_not_hide_class_folders(tmp_path):
    two_classes(tmp_path, ".")
    (tmp_path / "weather.csv").write_text("day,rain\n1,2\n")
    (tmp_path / "more.tsv").write_text("day\tsun\n1\t2\n")
    found = load_classification(tmp_path)
    assert found.classes == ["a", "b"] and "not read: more.tsv, weather.csv; --data-format csv" in found.notes[-1]
    for name in ("weather.csv", "more.tsv"):
        (tmp_path / name).unlink()
    (tmp_path / "labels.csv").write_text("file,label\na/0.png,x\nb/0.png,y\na/1.png,x\nb/1.png,y\n")
    found = load_classification(tmp_path, val_split=0.5)
    assert found.classes == ["x", "y"] and "--data-format folder reads class folders" in found.notes[-1]
    (tmp_path / "labels.csv").write_text("file,label\nmissing.png,x\n")
    with pytest.raises(UserError, match="missing.png.*; --data-format folder reads class folders"):
        load_classification(tmp_path)
    two_classes(tmp_path / "both", "train")
    (tmp_path / "both" / "noisy.csv").write_text("file,label\n")
    assert "not read: noisy.csv" in load_classification(tmp_path / "both").notes[-1]


# Questions


def test_json_with_a_mark_and_annotations_with_one_answer_are_read(tmp_path):
    questions, annotations = records(3)
    forms = [{"answer": "red"}, {"answers": ["blue", "blue", "red"]}, {"answers": [{"answer": "green"}]}]
    kept = [{"question_id": one["question_id"]} | forms[i % 3] for i, one in enumerate(annotations)]
    for part in ("Training", "valid"):
        write_json(tmp_path / part / "questions.json", "questions", questions)
        write_json(tmp_path / part / "annotations.json", "annotations", kept)
        for name in ("questions", "annotations"):
            file = tmp_path / part / f"{name}.json"
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        write_pictures(tmp_path / part, range(3), "{}.png")
    parts = read_vqa2(tmp_path)
    assert sorted(parts) == ["train", "val"] and parts["val"].pictures[0].path == "valid/0.png"
    assert [q.answer for q in parts["train"].questions[:3]] == ["red", "blue", "green"]
    assert parts["train"].questions[0].answers == ("red",) and len(parts["train"].questions[1].answers) == 3
    for wrong in ({"answer": 3}, {"answers": "red"}, {"answers": 7}, {"answers": [{"text": "x"}]}, {"answers": []}):
        write_json(tmp_path / "valid" / "annotations.json", "annotations", [kept[0] | wrong, *kept[1:]])
        with pytest.raises(UserError, match=r"valid/annotations.json: question \d+"):
            read_vqa2(tmp_path)
