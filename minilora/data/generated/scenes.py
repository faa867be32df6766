"""Scenes of one to four coloured shapes, with questions, choices and captions about them.

Everything is drawn and asked on the fly and depends only on (seed, world, split, picture number). A
`World` names the shapes and colours that occur and the families of questions that are asked. Worlds
for pre-training differ from those of the demonstrations in shapes, colours and families, so that
fine-tuning has something to adapt.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from minilora.data.generated import shapes
from minilora.data.generated.shapes import SOURCE_COLOURS, SOURCE_SHAPES, TARGET_COLOURS, TARGET_SHAPES
from minilora.data.pictures.folder import Sample, Split

QUESTIONS_PER_PICTURE = 5.3  # as in VQA v2: 443,757 questions on 82,783 pictures
FAMILIES = ("color", "shape", "count", "exists", "side")
RECORD = ("question", "answer", "question_type", "answer_type")


class Thing(NamedTuple):
    """One shape of a scene; row and column are 0 or 1."""

    colour: str
    shape: str
    row: int
    column: int

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class World:
    """The things that occur and the questions that are asked about them."""

    name: str
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    families: tuple[str, ...] = FAMILIES
    most: int = 4  # shapes in one picture


WORLDS = {
    world.name: world
    for world in (
        World("vqa-source", SOURCE_SHAPES[:6], tuple(SOURCE_COLOURS)[:5]),
        World("vqa", SOURCE_SHAPES[:2] + TARGET_SHAPES[2:4], tuple(SOURCE_COLOURS)[:2] + tuple(TARGET_COLOURS)[:2]),
        World("captions", SOURCE_SHAPES[:6], tuple(SOURCE_COLOURS), (), 2),
        World(
            "choice",
            SOURCE_SHAPES[:2] + TARGET_SHAPES[:4],
            tuple(SOURCE_COLOURS)[:2] + tuple(TARGET_COLOURS)[:4],
            ("color", "shape"),
            2,
        ),
    )
}


class Scenes:
    """Pictures of a split: `things(i)` is what the i-th of them shows, `image(i)` draws it."""

    def __init__(self, world: World | str, split: str, pictures: int, seed: int = 0):
        self.world = WORLDS[world] if isinstance(world, str) else world
        self.split, self.pictures, self.seed = split, pictures, seed
        self.questions = [
            {"question_id": 10 * i + k, "image_id": i, **record}
            for i in range(pictures)
            for k, record in enumerate(self._ask(i))
        ]

    def __len__(self) -> int:
        return self.pictures

    def things(self, i: int) -> list[Thing]:
        """One to `most` things in different cells of a 2 x 2 grid."""
        rng = self._rng(i, "things")
        cells = rng.permutation(4)[: rng.integers(1, self.world.most + 1)]
        pick = [(rng.integers(len(self.world.colours)), rng.integers(len(self.world.shapes))) for _ in cells]
        return [
            Thing(self.world.colours[colour], self.world.shapes[shape], *divmod(int(cell), 2))
            for cell, (colour, shape) in zip(cells, pick, strict=True)
        ]

    def pixels(self, i: int) -> np.ndarray:
        """Picture i as (48, 48, 3) uint8."""
        rng = self._rng(i, "paint")
        canvas = shapes.background(rng)
        for thing in self.things(i):
            radius = rng.uniform(7, 9.5)
            x, y = shapes.SIZE / 4 * (1 + 2 * np.array([thing.column, thing.row])) + rng.uniform(-1.5, 1.5, 2)
            mask = shapes.outline_mask(thing.shape, x, y, radius, rng.uniform(-0.15, 0.15))
            canvas = shapes.paint(canvas, mask, thing.colour, rng)
        return shapes.finish(canvas, rng)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels(i))

    def _ask(self, i: int) -> Iterable[dict]:
        """The records of picture i; nothing is asked about plain scenes."""
        return ()

    def _rng(self, i: int, use: str) -> np.random.Generator:
        return shapes.picture_rng(self.seed, f"{self.world.name}/{use}", self.split, i)


class ScenePictures(Split):
    """Scenes as the pictures of a split; `form` makes a file name of their numbers."""

    def __init__(self, scenes: Scenes, form: str):
        self.scenes = scenes
        super().__init__((Sample(form.format(i)) for i in range(len(scenes))), "shapes")

    def load(self, i: int) -> Image.Image:
        return self.scenes.image(i)


class ShapesVQA(Scenes):
    """Open-ended questions about scenes: `questions` is a list of records as VQA v2 has them.

    A record: question_id, image_id, question, answer, question_type, answer_type ("yes/no",
    "number", "other"). About 5.3 different questions per picture.
    """

    def _ask(self, i: int) -> Iterable[dict]:
        rng, things = self._rng(i, "questions"), self.things(i)
        low = int(QUESTIONS_PER_PICTURE)
        wanted = low + int(rng.random() < QUESTIONS_PER_PICTURE - low)
        asked: dict[str, dict] = {}
        for _ in range(20 * wanted):
            family = self.world.families[rng.integers(len(self.world.families))]
            if record := ASK[family](things, self.world, rng):
                asked.setdefault(record[0], dict(zip(RECORD, record, strict=True)))
            if len(asked) == wanted:
                break
        return asked.values()


class ShapesChoice(Scenes):
    """Four-way multiple choice about scenes: `questions` are one or two records per picture.

    A record: question_id, image_id, question, choices (4 strings), answer (index of the right one),
    type. The right answer stands at every place equally often on average, and wrong ones come from
    the same family.
    """

    def _ask(self, i: int) -> Iterable[dict]:
        rng, things = self._rng(i, "choices"), self.things(i)
        records = []
        for family in ("what", *self.world.families):
            record = _choose_what(things, self.world, rng) if family == "what" else self._from(family, things, rng)
            if record is None:
                continue
            question, right, wrong, kind = record
            place = int(rng.integers(4))
            choices = [wrong[k] for k in rng.permutation(len(wrong))[:3]]
            choices.insert(place, right)
            records.append({"question": question, "choices": choices, "answer": place, "type": kind})
        return [records[k] for k in rng.permutation(len(records))[:2]]

    def _from(self, family: str, things: list[Thing], rng) -> tuple[str, str, list[str], str] | None:
        """A question whose answer is a colour or a shape; the other ones are the wrong choices."""
        asked = ASK[family](things, self.world, rng)
        if asked is None or asked[1] not in self.world.colours + self.world.shapes:
            return None
        question, right, kind, _ = asked
        pool = self.world.colours if right in self.world.colours else self.world.shapes
        return question, right, [name for name in pool if name != right and name not in question], kind


def reading_order(things: Sequence[Thing]) -> list[Thing]:
    """Top row first, left to right."""
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def a(thing: Thing | str) -> str:
    """ "a red star", "an orange star": the indefinite article and the words."""
    return f"{'an' if str(thing)[0] in 'aeiou' else 'a'} {thing}"


def _only(things: list[Thing], field: str) -> list[Thing]:
    """The things whose colour (or shape) no other thing of the picture has."""
    count = Counter(getattr(thing, field) for thing in things)
    return [thing for thing in things if count[getattr(thing, field)] == 1]


def _ask_color(things: list[Thing], world: World, rng) -> tuple[str, str, str, str] | None:
    if not (known := _only(things, "shape")):
        return None
    thing = known[rng.integers(len(known))]
    return f"what color is the {thing.shape}?", thing.colour, "what color is the", "other"


def _ask_shape(things: list[Thing], world: World, rng) -> tuple[str, str, str, str] | None:
    if not (known := _only(things, "colour")):
        return None
    thing = known[rng.integers(len(known))]
    return f"what is the {thing.colour} shape?", thing.shape, "what is the", "other"


def _ask_count(things: list[Thing], world: World, rng) -> tuple[str, str, str, str]:
    if rng.random() < 0.5:
        return "how many shapes are there?", str(len(things)), "how many", "number"
    present = rng.random() < 0.7
    shape = things[rng.integers(len(things))].shape if present else world.shapes[rng.integers(len(world.shapes))]
    number = sum(thing.shape == shape for thing in things)
    return f"how many {plural(shape)} are there?", str(number), "how many", "number"


def _ask_exists(things: list[Thing], world: World, rng) -> tuple[str, str, str, str]:
    """Half of the answers are yes; half of those that are no change one thing, colour or shape."""
    thing = things[rng.integers(len(things))]
    pair, answer = (thing.colour, thing.shape), "yes"
    if rng.random() < 0.5:
        there = {(other.colour, other.shape) for other in things}
        missing = [(c, s) for c in world.colours for s in world.shapes if (c, s) not in there]
        near = [(c, s) for c, s in missing if (c == thing.colour) != (s == thing.shape)]
        pool = near if near and rng.random() < 0.5 else missing
        pair, answer = pool[rng.integers(len(pool))], "no"
    return f"is there {a(' '.join(pair))}?", answer, "is there a", "yes/no"


def _ask_side(things: list[Thing], world: World, rng) -> tuple[str, str, str, str] | None:
    """What shape is left of / right of / above / below another one, in the same row or column."""
    pairs = [(x, y) for x in things for y in _only(things, "shape") if x is not y]
    pairs = [(x, y) for x, y in pairs if (x.row == y.row) != (x.column == y.column)]
    if not pairs:
        return None
    x, y = pairs[rng.integers(len(pairs))]
    if x.row == y.row:
        side = "left of" if x.column < y.column else "right of"
    else:
        side = "above" if x.row < y.row else "below"
    return f"what is {side} the {y.shape}?", x.shape, "what is", "other"


ASK = {"color": _ask_color, "shape": _ask_shape, "count": _ask_count, "exists": _ask_exists, "side": _ask_side}


def _choose_what(things: list[Thing], world: World, rng) -> tuple[str, str, list[str], str] | None:
    """Which of two colours x two shapes is there; crossed, the words alone give nothing away."""
    thing = things[rng.integers(len(things))]
    there = {(other.colour, other.shape) for other in things}
    crossings = [
        [(colour, thing.shape), (thing.colour, shape), (colour, shape)]
        for colour in world.colours
        for shape in world.shapes
        if colour != thing.colour and shape != thing.shape
    ]
    crossings = [pairs for pairs in crossings if not there.intersection(pairs)]
    if not crossings:
        return None
    wrong = crossings[rng.integers(len(crossings))]
    return "what is in the picture?", a(thing), [a(" ".join(pair)) for pair in wrong], "what"


def plural(shape: str) -> str:
    """ "circles", "boxes"-style plurals for the few endings that occur."""
    return shape + ("es" if shape.endswith(("s", "ch", "x")) else "s")
