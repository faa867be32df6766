"""Plain English that a small text encoder learns from: everyday words, and sentences made of them.

Words stand in classes, so that templates give sentences with the grammar of questions about
pictures: words.txt has a paragraph for each class, which begins with its name.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from minilora.data.generated.scenes import ShapesVQA, plural
from minilora.data.generated.shapes import picture_rng

TEXT = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
WORDS = {name: words for name, *words in map(str.split, TEXT.split("\n\n"))}
WORDS["things"] = [plural(thing) for thing in WORDS["thing"]]
WORDS["place"] += ["left of", "right of", "next to", "in front of", "on top of", "close to"]

TEMPLATES = (
    "what color is the {thing} {place} the {thing}?",
    "what is the color of the {quality} {thing}?",
    "what color is the {quality} {thing}?",
    "what is {place} the {thing}?",
    "what is the {quality} {thing} {place} the {thing}?",
    "what is the {thing} made of?",
    "what shape is the {thing}?",
    "what shape is present?",
    "what shape does the image contain?",
    "which {thing} is {quality}?",
    "which things are {place} the {quality} {thing}?",
    "what kind of {thing} is this?",
    "what is the {thing} {action}ing?",
    "what are the {things} doing?",
    "who is {action}ing the {thing}?",
    "where is the {quality} {thing}?",
    "why is the {thing} {quality}?",
    "how many {things} are there?",
    "how many {things} are {place} the {thing}?",
    "how many {quality} {things} are in the picture?",
    "is there a {thing}?",
    "is there a {quality} {thing} in the image?",
    "is there not a {quality} {thing} in the image?",
    "is a {thing} present?",
    "is no {thing} present?",
    "does the image contain a {thing}?",
    "does the image not contain a {quality} {thing}?",
    "is the {thing} {quality}?",
    "is the {thing} {place} the {thing}?",
    "is this a {thing} or a {thing}?",
    "are the {things} {quality}?",
    "are there any {things} {place} the {thing}?",
    "do you see a {thing} {place} the {thing}?",
    "can the {thing} {action}?",
    "was the {thing} {action}ed?",
    "what {thing} is that?",
    "the {thing} is {place} the {quality} {thing}.",
    "a {quality} {thing} and {number} {things} {place} a {thing}.",
    "there are {number} {quality} {things}.",
    "{number} {things} {action} {place} the {thing}.",
    "a picture of a {quality} {thing} and a {quality} {thing}.",
    "{other} {other} {thing} {other} {action} {other}.",
    "{other} {quality} {other} {number} {other}?",
)
# This share of the sentences are questions about scenes: few different ones, but the demonstrations
# ask such questions.
SCENE_SHARE = 0.3


class Sentences:
    """`sentences[i]` is the i-th sentence; a function of (seed, i) alone."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.scenes = [record["question"] for record in ShapesVQA("vqa-source", "train", 400, seed).questions]

    def __getitem__(self, i: int) -> str:
        rng = picture_rng(self.seed, "sentences", "train", i)
        if rng.random() < SCENE_SHARE:
            return self.scenes[rng.integers(len(self.scenes))]
        template = TEMPLATES[rng.integers(len(TEMPLATES))]

        def draw(slot: re.Match) -> str:
            words = WORDS[slot[1]]
            return words[rng.integers(len(words))]

        return re.sub(r"\{(\w+)\}", draw, template)


def vocabulary_texts() -> Iterator[str]:
    """What the vocabulary is learned from: every word with its usual endings, common ones often."""
    everyday = [*WORDS["other"], *WORDS["number"], *WORDS["place"]]
    everyday += [word for text in TEMPLATES for word in re.findall("[a-z]+", text)]
    yield from (f"{word} {word} {word}" for word in everyday)
    yield from (f"{thing} {thing} {plural(thing)}" for thing in WORDS["thing"])
    yield from (f"{quality} {quality} {quality}er" for quality in WORDS["quality"])
    yield from (f"{action} {action} {action}ing {action}ed" for action in WORDS["action"])
    for world in ("vqa-source", "vqa"):
        yield from (record["question"] for record in ShapesVQA(world, "train", 60).questions)
