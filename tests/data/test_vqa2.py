"""Reading questions about pictures: layouts, cleaning, splits by picture, answers as classes, bad input, batches."""

import json

import numpy as np
import pytest

from minilora.data.questions.vqa2 import Question, answer_key, clean_question, read_vqa2
from minilora.data.questions.vqa_batches import bucketed_batches, grouped_batches, shuffled_groups
from minilora.data.vqa_sets import choose_answers, hold_out, load_vqa, question_only_guess, take_subset
from minilora.errors import UserError
from minilora.report.vqa_metric import score_vqa
from tests.support.vqa_data import records, write_json, write_pictures, write_vqa


@pytest.mark.parametrize(
    "text, clean",
    [
        ("What's the guy's  name?", "what is the guy is name?"),
        ("It\u2019s RED, isn't it?", "it is red, is not it?"),
        ("They're here; can't you see?", "they are here; can not you see?"),
        ("Won't he?\n Let's see", "will not he? let us see"),
        ("I'd say we've won, you'll see I'm right", "i would say we have won, you will see i am right"),
    ],
)
def test_questions_are_lowered_and_contractions_written_out(text, clean):
    assert clean_question(text) == clean


@pytest.mark.parametrize(
    "text, key",
    [("T.V.", "tv"), ("Red!", "red"), ("t-shirt", "t shirt"), ("2.5", "2.5"), ("10:30", "10:30"), ("?", "?")],
)
def test_spellings_of_one_answer_share_a_key(text, key):
    assert answer_key(text) == key


def test_official_names_are_read_and_ids_are_kept_apart_by_part(tmp_path):
    for part, pictures in (("train2014", 4), ("val2014", 2)):
        questions, annotations = records(pictures, answers=10)
        write_json(tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json", "questions", questions)
        write_json(tmp_path / f"v2_mscoco_{part}_annotations.json", "annotations", annotations)
        write_pictures(tmp_path / part, range(pictures), f"COCO_{part}_{{:012d}}.jpg")
    for part in ("test2015", "test-dev2015"):
        write_json(tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json", "questions", records(3)[0])
    write_pictures(tmp_path / "test2015", range(3), "COCO_test2015_{:012d}.jpg")
    parts = read_vqa2(tmp_path)
    assert {name: (len(p.questions), len(p.shown)) for name, p in parts.items()} == {
        "train": (12, 4),
        "val": (6, 2),
        "test": (9, 3),
    }
    assert parts["train"].pictures[0].path == "train2014/COCO_train2014_000000000000.jpg"
    assert parts["val"].pictures[0].path == "val2014/COCO_val2014_000000000000.jpg"
    assert parts["train"].answered and not parts["test"].answered
    assert len(parts["train"].questions[0].answers) == 10


def test_one_pair_of_files_is_split_by_picture(tmp_path):
    questions, annotations = records(20)
    write_json(tmp_path / "questions.json", "questions", questions)
    write_json(tmp_path / "annotations.json", "annotations", annotations)
    write_pictures(tmp_path / "photos", range(20), "{}.png")
    splits = load_vqa(tmp_path, val_split=0.25, seed=3)
    assert (len(splits.train.shown), len(splits.val.shown)) == (15, 5)
    assert not set(splits.train.shown) & set(splits.val.shown)
    assert {q.question_id for q in splits.train.questions + splits.val.questions} == {
        q["question_id"] for q in questions
    }
    again = load_vqa(tmp_path, val_split=0.25, seed=3)
    assert again.val.questions == splits.val.questions


def test_split_by_question_holds_out_a_share_of_the_questions(tmp_path):
    part = read_vqa2(write_vqa(tmp_path, train=20))["train"]
    train, val = hold_out(part, 0.2, 0, "question")
    assert (len(train.questions), len(val.questions)) == (48, 12)
    assert set(train.shown) & set(val.shown)


def test_subset_keeps_a_share_or_a_number_of_the_pictures_with_all_their_questions(tmp_path):
    part = read_vqa2(write_vqa(tmp_path, train=20))["train"]
    for subset, pictures in ((0.25, 5), (7, 7), (1.0, 20), (50, 20)):
        kept = take_subset(part, subset, 0)
        assert len(kept.shown) == pictures and len(kept.questions) == 3 * pictures
    assert take_subset(part, 0.25, 0).shown != take_subset(part, 0.25, 1).shown


def test_top_answers_are_classes_in_alphabetical_order_and_the_rest_is_out():
    said = ["yes"] * 5 + ["No"] * 2 + ["no."] + ["zebra"] * 2 + ["red"]
    questions = [Question(i, 0, "?", (answer,), answer) for i, answer in enumerate(said)]
    answers = choose_answers(questions, 3)
    assert answers.labels == ["no", "yes", "zebra"]
    assert answers.of("NO") == 0 and answers.of("red") == -1
    assert answers.classes(questions).tolist() == [1] * 5 + [0] * 3 + [2] * 2 + [-1]
    assert len(choose_answers(questions, 100).labels) == 4


BROKEN = {
    "duplicate": ("questions", lambda rows: rows.append(rows[0]), "occurs twice"),
    "no annotation": ("annotations", lambda rows: rows.pop(), "has no annotation"),
    "no question": ("questions", lambda rows: rows.pop(), "annotations have no question"),
    "empty question": ("questions", lambda rows: rows[1].update(question="  "), "question 1 is empty"),
    "text for a number": ("questions", lambda rows: rows[1].update(image_id="1"), "questions[1].image_id"),
    "no answers": ("annotations", lambda rows: rows[0].update(answers=[], multiple_choice_answer=""), "no answers"),
    "answers no list": ("annotations", lambda rows: rows[0].update(answers="red"), "answers must be a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_records_are_one_line_that_names_file_and_id(tmp_path, name):
    key, damage, message = BROKEN[name]
    path = write_vqa(tmp_path) / f"train_{key}.json"
    rows = json.loads(path.read_text())[key]
    damage(rows)
    write_json(path, key, rows)
    with pytest.raises(UserError) as error:
        read_vqa2(tmp_path)
    assert message in str(error.value) and "train_" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"questions": [{"question_id": 1,}]}', "broken json at line 1, column"),
        (b'{"questions": [\xff]}', "not UTF-8: byte 0xff at 15"),
        (b"[]", 'no list under "questions"'),
        (b"[" * 100_000, "broken json"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path, content, message):
    path = write_vqa(tmp_path) / "train_questions.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="train_questions.json") as error:
        read_vqa2(tmp_path)
    assert message in str(error.value)


def test_missing_picture_is_an_error_or_grey_by_flag(tmp_path):
    (write_vqa(tmp_path) / "train" / "picture_000000000003.png").unlink()
    with pytest.raises(UserError, match="picture of image_id 3 is missing"):
        read_vqa2(tmp_path)
    part = read_vqa2(tmp_path, "skip")["train"]
    assert part.notes == ("train: 1 missing pictures, shown as grey",) and len(part.questions) == 36


def test_skipping_leaves_out_what_has_no_other_half_and_counts_it(tmp_path):
    path = write_vqa(tmp_path) / "train_annotations.json"
    rows = json.loads(path.read_text())["annotations"]
    write_json(path, "annotations", rows[1:] + [rows[1] | {"question_id": 999}])
    part = read_vqa2(tmp_path, "skip")["train"]
    assert len(part.questions) == 35
    assert part.notes == ("train: 1 questions without annotation", "train: 1 annotations without question")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: write_pictures(root / "train", [3], "other_{}.png"), "may be"),
        (lambda root: (root / "train_annotations.json").unlink(), "its annotations are missing"),
        (lambda root: (root / "v2_train_questions.json").write_text("{}"), "are both questions of train"),
    ],
)
def test_what_could_mean_two_things_is_refused(tmp_path, make, message):
    make(write_vqa(tmp_path))
    with pytest.raises(UserError, match=message):
        read_vqa2(tmp_path)


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither VQA v2 questions"):
        load_vqa(tmp_path)


def test_guess_without_pictures_follows_the_words_else_the_usual_answer():
    train = [Question(i, 0, "is it red?", ("yes",), "yes") for i in range(3)]
    train += [Question(5, 0, "how many?", ("2",), "2")]
    asked = [Question(7, 0, "how many?"), Question(8, 0, "how many dogs?")]
    assert question_only_guess(train, asked) == {7: "2", 8: "yes"}


@pytest.mark.parametrize(
    "name, expected, counts", [("easy_vqa", 66.3, (19210, 4868)), ("daquar_small", 13.8, (1739, 892))]
)
def test_guess_without_pictures_on_real_sets(shared, name, expected, counts):
    splits = load_vqa(shared / name)
    assert (len(splits.train.questions), len(splits.val.questions)) == counts
    guess = question_only_guess(splits.train.questions, splits.val.questions)
    scores = score_vqa(guess, [q.annotation() for q in splits.val.questions])
    assert abs(scores["overall"] - expected) < 0.06


def test_real_vqa_v2_questions_have_ten_answers_and_the_official_metric(shared):
    splits = load_vqa(shared / "vqav2_small", val_split=0.25)
    assert len(splits.train.shown) + len(splits.val.shown) == 48
    assert all(len(q.answers) == 10 for q in splits.train.questions)
    truth = {q.question_id: q.answer for q in splits.val.questions}
    scores = score_vqa(truth, [q.annotation() for q in splits.val.questions])
    assert scores["metric"] == "official VQA accuracy" and scores["overall"] > 60


def test_grouped_batches_never_part_a_picture_and_lose_no_question():
    picture = np.random.default_rng(0).integers(0, 40, 200)
    for batches in (grouped_batches(picture, 16), shuffled_groups(picture, 16, 0, 1)):
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        where = [{int(picture[i]) for i in batch} for batch in batches]
        assert sum(map(len, where)) == len(set(picture.tolist()))
        assert max(map(len, batches)) <= 16
    assert shuffled_groups(picture, 16, 0, 1) == shuffled_groups(picture, 16, 0, 1)
    assert shuffled_groups(picture, 16, 0, 1) != shuffled_groups(picture, 16, 0, 2)


def test_a_picture_with_more_questions_than_a_batch_stays_whole():
    assert grouped_batches(np.array([0, 1, 1, 1, 1, 2]), 3) == [[0], [1, 2, 3, 4], [5]]


def test_buckets_pad_little_and_depend_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(4, 30, 2000)
    batches = bucketed_batches(lengths, 16, 0, 0)
    assert sorted(i for batch in batches for i in batch) == list(range(2000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.08 * lengths.sum()
    assert batches == bucketed_batches(lengths, 16, 0, 0) != bucketed_batches(lengths, 16, 0, 1)
