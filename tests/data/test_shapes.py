"""The procedural sets: the same for the same seed, balanced, right answers, nothing in common between tasks."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from minilora.data.generated.scenes import WORLDS, Scenes, ShapesChoice, ShapesVQA, Thing, a, plural, reading_order
from minilora.data.generated.shapes import (
    COLOURS,
    OUTLINES,
    SOURCE_COLOURS,
    SOURCE_SHAPES,
    TARGET_COLOURS,
    TARGET_SHAPES,
    classification_splits,
    outline_mask,
    task_classes,
)
from minilora.data.sets import load_classification


def test_source_and_target_share_no_shape_and_no_colour():
    assert set(SOURCE_SHAPES).isdisjoint(TARGET_SHAPES) and len(SOURCE_SHAPES) == len(TARGET_SHAPES) == 8
    assert set(SOURCE_COLOURS).isdisjoint(TARGET_COLOURS)
    assert len(task_classes("source")) == 48 and task_classes("target") == list(TARGET_SHAPES)


@pytest.mark.parametrize("task, classes", [("source", 48), ("target", 8)])
def test_pictures_are_deterministic_different_and_balanced(task, classes):
    first, again = (classification_splits(task, 96, 48, 48) for _ in range(2))
    for i in (0, 17, 95):
        assert np.array_equal(first.train.pixels(i), again.train.pixels(i))
        assert not np.array_equal(first.train.pixels(i), first.val.pixels(i % 48))
    assert not np.array_equal(first.train.pixels(0), classification_splits(task, 96, seed=1).train.pixels(0))
    assert first.train.pixels(0).shape == (48, 48, 3) and first.train.load(0).mode == "RGB"
    assert set(Counter(sample.label for sample in first.train).values()) == {96 // classes}
    assert len({first.train.pixels(i).tobytes() for i in range(96)}) == 96


def test_a_part_of_a_split_shows_the_same_pictures():
    train = classification_splits(train=20).train
    part = train.take([5, 3])
    assert np.array_equal(part.pixels(0), train.pixels(5)) and part[1] == train[3]


def test_load_classification_gives_the_target_task():
    splits = load_classification(None, "shapes", subset=0.1)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (152, 600, 600)
    assert splits.classes == list(TARGET_SHAPES)


def test_outlines_stay_near_the_unit_square_and_differ():
    masks = {name: outline_mask(name, 24, 24, 14) for name in OUTLINES}
    for name, mask in masks.items():
        assert mask.shape == (48, 48) and 0 <= mask.min() and mask.max() == 1, name
        assert np.abs(np.concatenate(OUTLINES[name])).max() <= 1.21, name
        assert mask[:5].sum() == mask[-5:].sum() == 0, name
    for one in masks:
        for other in masks:
            overlap = np.minimum(masks[one], masks[other]).sum() / np.maximum(masks[one], masks[other]).sum()
            assert one == other or overlap < 0.87, (one, other)


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_scenes_show_what_they_say(world):
    scenes = Scenes(world, "train", 40)
    for i in range(40):
        things = scenes.things(i)
        assert things == Scenes(world, "train", 40).things(i)
        assert 1 <= len(things) <= scenes.world.most
        assert len({(thing.row, thing.column) for thing in things}) == len(things)
        pixels = scenes.pixels(i).astype(float)
        for thing in things:  # somewhere in its cell the colour of the thing is found
            cell = pixels[24 * thing.row : 24 * thing.row + 24, 24 * thing.column : 24 * thing.column + 24]
            assert np.abs(cell - COLOURS[thing.colour]).max(axis=2).min() < 45, (i, thing)
    assert np.array_equal(scenes.pixels(3), Scenes(world, "train", 40).pixels(3))


def answer(things: list[Thing], question: str) -> str:
    """The answer by another route than the generator's: from the words of the question."""
    words = question.rstrip("?").split()
    if question.startswith("what color"):
        return next(thing.colour for thing in things if thing.shape == words[-1])
    if words[-1] == "shape":
        return next(thing.shape for thing in things if thing.colour == words[-2])
    if question == "how many shapes are there?":
        return str(len(things))
    if question.startswith("how many"):
        return str(sum(plural(thing.shape) == words[2] for thing in things))
    if question.startswith("is there"):
        return "yes" if (words[-2], words[-1]) in {(thing.colour, thing.shape) for thing in things} else "no"
    (y,) = [thing for thing in things if thing.shape == words[-1]]
    step = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[2]]
    (x,) = [thing for thing in things if (thing.row - y.row, thing.column - y.column) == step]
    return x.shape


@pytest.mark.parametrize("world", ["vqa", "vqa-source"])
def test_every_answer_is_right_and_every_family_occurs(world):
    vqa = ShapesVQA(world, "val", 150)
    for record in vqa.questions:
        assert answer(vqa.things(record["image_id"]), record["question"]) == record["answer"], record
    kinds = {"yes/no", "number", "other"}
    assert {record["answer_type"] for record in vqa.questions} == kinds
    assert len({record["question_type"] for record in vqa.questions}) == 5
    assert len({record["question_id"] for record in vqa.questions}) == len(vqa.questions)


def test_questions_per_picture_as_in_vqa_v2_and_words_alone_do_not_answer():
    vqa = ShapesVQA("vqa", "train", 600)
    assert 5.2 < len(vqa.questions) / 600 < 5.4
    pairs = {(record["image_id"], record["question"]) for record in vqa.questions}
    assert len(pairs) == len(vqa.questions)
    answers = defaultdict(Counter)
    for record in vqa.questions:
        answers[record["question"]][record["answer"]] += 1
    best = sum(max(counter.values()) for counter in answers.values()) / len(vqa.questions)
    assert best < 0.5


def test_splits_and_seeds_ask_about_different_pictures():
    one, other = ShapesVQA("vqa", "train", 30), ShapesVQA("vqa", "val", 30)
    assert one.questions != other.questions and one.questions != ShapesVQA("vqa", "train", 30, seed=1).questions
    assert one.questions == ShapesVQA("vqa", "train", 30).questions


def test_choices_have_one_right_answer_and_the_words_do_not_give_it_away():
    choice = ShapesChoice("choice", "train", 400)
    seen = Counter()
    for record in choice.questions:
        assert len(set(record["choices"])) == 4
        right, things = record["choices"][record["answer"]], choice.things(record["image_id"])
        present = {f"{thing.colour} {thing.shape}" for thing in things}
        if record["type"] == "what":
            phrases = [option.split(" ", 1)[1] for option in record["choices"]]
            assert [phrase in present for phrase in phrases].index(True) == record["answer"]
            assert sum(phrase in present for phrase in phrases) == 1
            assert Counter(word for phrase in phrases for word in phrase.split()).most_common()[-1][1] == 2
        else:
            assert answer(things, record["question"]) == right
            assert not any(option in record["question"] for option in record["choices"])
        seen[record["answer"]] += 1
    assert min(seen.values()) > 0.8 * len(choice.questions) / 4


def test_things_are_named_in_reading_order():
    scenes = Scenes("captions", "train", 50)
    for i in range(50):
        things = sorted(scenes.things(i), key=lambda thing: (thing.row, thing.column))
        assert list(map(a, reading_order(scenes.things(i)))) == [f"a {x.colour} {x.shape}" for x in things]
