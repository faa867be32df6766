"""Captions of scenes in several wordings, and the vocabulary they need: what the bundled nano
CLIP is trained on.

Who reads captions of the web meets one picture described in many ways, and mostly in part. So here:
some captions name one thing of several, and none of them has the form of a question.
"""

from collections.abc import Iterator

from minilora.data.generated.scenes import Scenes, a, reading_order
from minilora.data.generated.sentences import vocabulary_texts

WORDINGS = (
    "a picture of {}",
    "a photo of {}.",
    "{}",
    "this is {}.",
    "there is {} in the picture",
    "what you see here is {}",
    "the picture shows {}, and the ground is dark",
)
PART = 0.3  # of the captions name one thing only


class Captions(Scenes):
    """Pictures with one caption each: a function of (seed, world, split, i) alone."""

    def __init__(self, split: str, pictures: int, seed: int = 0):
        super().__init__("captions", split, pictures, seed)

    def caption(self, i: int) -> str:
        rng = self._rng(i, "caption")
        things = reading_order(self.things(i))
        if rng.random() < PART:
            things = [things[rng.integers(len(things))]]
        return WORDINGS[rng.integers(len(WORDINGS))].format(" and ".join(map(a, things)))


def caption_vocabulary() -> Iterator[str]:
    """Everyday English with the words of questions, and captions."""
    yield from vocabulary_texts()
    captions = Captions("train", 400)
    yield from (captions.caption(i) for i in range(len(captions)))
    yield from ["question answer photo magenta cyan crescent hourglass"] * 20
