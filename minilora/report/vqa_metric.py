"""The official VQA v2 accuracy, with the quirks of its reference code, and exact match for sets
with fewer answers.

Ten people answered each question. A prediction is compared with each choice of nine of them and
scores min(1, matches / 3); the accuracy is the mean over the ten choices. For k equal answers of
ten: 0, .3, .6, .9, 1, 1 ... (the paper's short form min(k / 3, 1) is not the same: .333 for k = 1).

Before comparing, both sides are normalised, but only where the ten people do not all agree: a
unanimous answer is compared as it stands, so "The cat." against ten times "cat" is wrong, and so is
"2" against ten times "two". Rules and quirks follow vqaEval.py of
https://github.com/GT-Vision-Lab/VQA; they are kept because numbers in papers were made with them.
Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from minilora.atomic import atomic_write
from minilora.errors import UserError
from minilora.report.metrics import percent
from minilora.textfiles import printable

OFFICIAL = "official VQA accuracy"
EXACT = "exact match after normalisation"
ANSWERS = 10  # people per question in VQA v2

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}
_comma_in_number = re.compile(r"\d,\d")
_loose_period = re.compile(r"\.(?!\d)")

# Right spellings; the table below holds each of them with one apostrophe forgotten.
_SPELLED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
""".split()


def _contractions() -> dict[str, str]:
    """The reference's table of 120 entries: {word with one apostrophe missing: right spelling}.
    Its four keys with a capital I never apply, as words are lower-cased first: "im" stays "im"."""
    table = {}
    for word in _SPELLED:
        table |= {word[:i] + word[i + 1 :]: word for i, letter in enumerate(word) if letter == "'"}
    # Its three odd entries: two that change nothing, and one the wrong way round.
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Each punctuation mark becomes a space, or vanishes if anywhere in `text` it touches a space
    or if some comma stands between digits ("1,000"); then the periods that no digit follows vanish,
    the first 32 of them: the reference passes re.UNICODE, which is 32, where re.sub has a count."""
    out, numeric = text, _comma_in_number.search(text) is not None
    for mark in PUNCTUATION:
        vanishes = numeric or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if vanishes else " ")
    return _loose_period.sub("", out, count=32)


def map_words(text: str) -> str:
    """Lower case, number words to digits ("none" too), no articles, contractions set right."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=100_000)  # a validation set has two million answers, but few distinct ones
def normalise_answer(text: str) -> str:
    """The whole normalisation: "The two dogs, dont!" -> "2 dogs don't"."""
    return map_words(strip_punctuation(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(matches: int, answers: int = ANSWERS) -> float:
    """Mean of min(1, matches among the others / 3) over people; k of ten: 0, .3, .6, .9, 1 ..."""
    agreeing = matches * min(1.0, (matches - 1) / 3)
    return (agreeing + (answers - matches) * min(1.0, matches / 3)) / answers


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official accuracy of one prediction against the (ten) answers of one question, 0..1."""
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:  # only then does the reference normalise, either side
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    return leave_one_out(answers.count(prediction), len(answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals the (first) most common answer, both normalised; else 0."""
    common = Counter(map(normalise_answer, answers)).most_common(1)[0][0]
    return float(normalise_answer(prediction) == common)


def answers_of(annotation: Mapping) -> list[str]:
    """The answers of one annotation: all ten, or its `multiple_choice_answer` or `answer`."""
    if annotation.get("answers"):
        return [a["answer"] if isinstance(a, Mapping) else str(a) for a in annotation["answers"]]
    return [str(annotation.get("multiple_choice_answer", annotation.get("answer", "")))]


def score_vqa(predictions: Mapping, annotations: Iterable[Mapping]) -> dict:
    """Score {question_id: answer} against annotations (question_id, answers,
    answer_type, question_type).

    Official accuracy where every question has ten answers or more, exact match after normalisation
    otherwise. Returns metric (its name), count, accuracy (0..1), overall, by_answer_type,
    by_question_type (100 x, rounded to two decimals as the reference prints them),
    counts_by_answer_type and per_question {id: 0..1}. Raises UserError where predictions and
    annotations do not have the same questions.
    """
    annotations = list(annotations)
    ids = [annotation["question_id"] for annotation in annotations]
    _same_questions(predictions, ids)
    official = bool(annotations) and all(len(answers_of(a)) >= ANSWERS for a in annotations)
    score = vqa_accuracy if official else exact_match
    per_question = {a["question_id"]: score(predictions[a["question_id"]], answers_of(a)) for a in annotations}
    groups = {key: _groups(annotations, key, per_question) for key in ("answer_type", "question_type")}
    accuracy = sum(per_question.values()) / max(len(ids), 1)
    return {
        "metric": OFFICIAL if official else EXACT,
        "count": len(ids),
        "accuracy": accuracy,
        "overall": round(100 * accuracy, 2),
        **{f"by_{key}": {k: round(100 * sum(v) / len(v), 2) for k, v in groups[key].items()} for key in groups},
        "counts_by_answer_type": {k: len(v) for k, v in groups["answer_type"].items()},
        "per_question": per_question,
    }


def _same_questions(predictions: Mapping, ids: Sequence) -> None:
    if len(ids) != len(set(ids)):
        double = next(i for i, count in Counter(ids).items() if count > 1)
        raise UserError(f"VQA annotations: question_id {double} occurs twice; scores would count it twice")
    missing, extra = set(ids) - set(predictions), set(predictions) - set(ids)
    for numbers, problem in ((missing, "questions have no prediction"), (extra, "predictions have no annotation")):
        if numbers:
            such = f"{len(numbers)} {problem} (such as {', '.join(sorted(map(str, numbers))[:3])})"
            raise UserError(f"VQA results must cover exactly the annotated questions: {such}")


def _groups(annotations: Sequence[Mapping], key: str, per_question: Mapping) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for annotation in annotations:
        if annotation.get(key) is not None:
            groups.setdefault(str(annotation[key]), []).append(per_question[annotation["question_id"]])
    return dict(sorted(groups.items()))


def write_results(path: str | Path, predictions: Mapping) -> None:
    """The official results file: a JSON list of {"question_id": int, "answer": str}."""
    rows = [{"question_id": question, "answer": answer} for question, answer in predictions.items()]
    atomic_write(Path(path), json.dumps(rows).encode())


def format_vqa(scores: Mapping, question_types: int = 10) -> str:
    """The scores as text: overall, by answer type, and the weakest of the question types."""
    worth = list(scores["per_question"].values())
    share = percent(scores["accuracy"], len(worth), statistics.pstdev(worth) if worth else 0.0)
    lines = [f"accuracy {share} ({scores['metric']}) | {scores['count']} questions"]
    for kind, value in scores["by_answer_type"].items():
        lines.append(f"  {printable(kind):<10} {value:6.2f} %  ({scores['counts_by_answer_type'][kind]} questions)")
    by_type = sorted(scores["by_question_type"].items(), key=lambda item: item[1])
    if by_type:
        lines.append(f"  weakest {min(question_types, len(by_type))} of {len(by_type)} question types:")
        lines += [f"    {printable(kind):<24} {value:6.2f} %" for kind, value in by_type[:question_types]]
    return "\n".join(lines)
