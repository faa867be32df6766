"""What the accuracy tables stand on: which questions choose, and which are only quoted."""

import json

from minilora.data.vqa_sets import load_vqa
from tests.benchmarks.daquar import lay_out


def test_the_quoted_questions_choose_nothing_and_no_picture_of_val_is_trained_on(shared, tmp_path):
    source = shared / "daquar_small"  # lies on the disk as the whole does
    splits = load_vqa(lay_out(source, tmp_path / "data"))
    ids = {name: {q.question_id for q in part.questions} for name, part in splits.parts.items()}
    quoted, given = (json.loads((source / f"{p}_questions.json").read_text())["questions"] for p in ("val", "train"))
    assert ids["test"] == {row["question_id"] for row in quoted}
    assert ids["train"] | ids["val"] == {row["question_id"] for row in given} and not ids["train"] & ids["val"]
    pictures = {name: {part.pictures[j].path.split("/")[1] for j in part.shown} for name, part in splits.parts.items()}
    assert not pictures["train"] & pictures["val"] and len(pictures["val"]) == 20
    again = load_vqa(lay_out(source, tmp_path / "again"))
    assert {q.question_id for q in again.val.questions} == ids["val"], "the same for every seed and row"
