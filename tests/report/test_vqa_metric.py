"""The official VQA accuracy: every golden pair, every quirk, and exact match where people are fewer than ten."""

import json

import pytest

from minilora.errors import UserError
from minilora.report import vqa_metric as vqa


def question(number, answers, answer_type="other", question_type="what is"):
    answers = [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)]
    return {"question_id": number, "answers": answers, "answer_type": answer_type, "question_type": question_type}


def test_normalisation_equals_all_golden_pairs(shared):
    golden = json.loads((shared / "vqa_norm_golden.json").read_text(encoding="utf-8"))
    assert len(golden) > 60
    assert {text: vqa.normalise_answer(text) for text in golden} == golden


def test_the_contraction_table_has_the_references_120_entries():
    assert len(vqa.CONTRACTIONS) == 120
    assert vqa.CONTRACTIONS["couldn'tve"] == vqa.CONTRACTIONS["couldnt've"] == "couldn't've"
    assert vqa.CONTRACTIONS["y'all'dve"] == "y'all'd've" and vqa.CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert sum(key != key.lower() for key in vqa.CONTRACTIONS) == 4  # which never apply
    assert [key for key, value in vqa.CONTRACTIONS.items() if key == value] == ["let's", "she's"]


@pytest.mark.parametrize("matches, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_k_equal_answers_of_ten_give_the_leave_one_out_mean(matches, expected):
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa.vqa_accuracy("red", answers) == pytest.approx(expected, abs=1e-12)
    plain = [min(1, sum(a == "red" for a in answers[:i] + answers[i + 1 :]) / 3) for i in range(10)]
    assert vqa.vqa_accuracy("red", answers) == pytest.approx(sum(plain) / 10, abs=1e-12)


def test_unanimous_answers_are_compared_raw():
    assert vqa.vqa_accuracy("The Cat.", ["cat"] * 10) == 0.0
    assert vqa.vqa_accuracy("2", ["two"] * 10) == 0.0
    assert vqa.vqa_accuracy("The Cat.", ["cat"] * 9 + ["dog"]) == 1.0
    assert vqa.vqa_accuracy(" cat\n", ["cat"] * 10) == 1.0  # white space is cleaned in any case


def test_a_comma_between_digits_deletes_all_punctuation():
    assert vqa.normalise_answer("1,000-2,000") == "10002000"
    assert vqa.normalise_answer("one-two") == "1 2"


def test_at_most_32_periods_vanish():
    assert vqa.normalise_answer("." * 40) == "." * 8


def test_scores_by_answer_type_and_question_type_are_rounded_percentages():
    data = [
        question(1, ["yes"] * 10, "yes/no", "is the"),
        question(2, ["no"] * 9 + ["yes"], "yes/no", "is the"),
        question(3, ["red"] * 3 + ["blue"] * 7, "other", "what color"),
    ]
    scores = vqa.score_vqa({1: "yes", 2: "yes", 3: "red"}, data)
    assert scores["metric"] == "official VQA accuracy" and scores["overall"] == 73.33
    assert scores["by_answer_type"] == {"other": 90.0, "yes/no": 65.0}
    assert scores["by_question_type"] == {"is the": 65.0, "what color": 90.0}
    assert scores["per_question"] == pytest.approx({1: 1.0, 2: 0.3, 3: 0.9})
    assert "73.33" in vqa.format_vqa(scores) and "official" in vqa.format_vqa(scores)


def test_fewer_than_ten_answers_are_scored_by_exact_match_and_say_so():
    data = [{"question_id": 1, "answer": "two dogs"}, {"question_id": 2, "multiple_choice_answer": "wood"}]
    scores = vqa.score_vqa({1: "The 2 dogs.", 2: "tile"}, data)
    assert scores["metric"] == "exact match after normalisation" and scores["accuracy"] == 0.5
    assert scores["by_answer_type"] == {} and "exact match" in vqa.format_vqa(scores)


@pytest.mark.parametrize(
    "predictions, words", [({1: "a"}, "1 questions have no"), ({1: "a", 2: "b", 3: "c"}, "1 predic")]
)
def test_results_must_cover_exactly_the_annotated_questions(predictions, words):
    with pytest.raises(UserError, match=words):
        vqa.score_vqa(predictions, [question(1, ["a"] * 10), question(2, ["a"] * 10)])


def test_a_question_id_that_occurs_twice_is_refused():
    with pytest.raises(UserError, match="question_id 5 occurs twice"):
        vqa.score_vqa({5: "a"}, [question(5, ["a"] * 10)] * 2)


def test_the_results_file_has_the_official_form(tmp_path):
    vqa.write_results(tmp_path / "results.json", {262148000: "down", 262148001: "café"})
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert rows == [{"question_id": 262148000, "answer": "down"}, {"question_id": 262148001, "answer": "café"}]


def test_the_most_common_answers_of_real_annotations_score_as_the_reference_does(shared):
    data = json.loads((shared / "vqav2_small" / "annotations.json").read_text(encoding="utf-8"))["annotations"]
    scores = vqa.score_vqa({a["question_id"]: a["multiple_choice_answer"] for a in data}, data)
    assert scores["metric"] == vqa.OFFICIAL and set(scores["by_answer_type"]) == {"number", "other", "yes/no"}
    for annotation in data:  # the definition, word for word, beside the closed form
        answers = [a["answer"] for a in annotation["answers"]]
        said = annotation["multiple_choice_answer"]
        if len(set(answers)) > 1:
            answers, said = [vqa.normalise_answer(a) for a in answers], vqa.normalise_answer(said)
        others = [min(1, sum(b == said for j, b in enumerate(answers) if j != i) / 3) for i in range(10)]
        assert scores["per_question"][annotation["question_id"]] == pytest.approx(sum(others) / 10, abs=1e-12)
