"""Damaged files of every kind for a given time: `python -m tests.support.fuzz_for MINUTES SEED`.

Each round takes a few cases of every kind of tests/programs/test_fuzz.py, with numbers that no test has. What is found
is printed as it is found, with the seed that makes it again; the last line counts.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from minilora.data.pictures.images import open_image
from tests.programs import test_fuzz as kinds
from tests.support.fuzzing import Watch, strange_metadata, strange_place


class Folders:
    """What the fixture `whole` asks of pytest."""

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))


def cases(whole: Path, tmp: Path, seed: str):
    """(label, function) of one round."""
    rows = [(name, *row) for name, row in kinds.HEADERS.items()] + kinds.TEXTS
    for number, (example, file, reader) in enumerate(rows):
        folder = kinds.shutil.copytree(whole / example, tmp / f"{number}" / example)
        rng = random.Random(f"{seed}/{number}")
        if rng.randrange(6) == 0:
            strange_place(rng, folder / file)
        else:
            (folder / file).write_bytes(kinds.damaged(rng, folder / file))
        yield f"{example}/{file}", lambda reader=reader, folder=folder: reader(folder)
    for number in range(20):
        yield "picture", lambda n=number: kinds.use_picture(tmp, random.Random(f"{seed}/picture/{n}"))
    yield "metadata", lambda: pixels_stay(tmp, random.Random(f"{seed}/metadata"))
    yield "names", lambda: kinds.use_names(tmp / "names", random.Random(f"{seed}/names"))


def pixels_stay(tmp: Path, rng: random.Random) -> None:
    pixels = np.full((9, 7, 3), rng.randrange(256), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp / "x.png")
    (tmp / "x.png").write_bytes(strange_metadata(rng, (tmp / "x.png").read_bytes()))
    assert np.array_equal(np.asarray(open_image(tmp / "x.png")), pixels)


def main(minutes: float, seed: str) -> int:
    whole, tmp = kinds.whole.__wrapped__(Folders()), Folders().mktemp("cases")
    watch, end, turn, shown = Watch(tmp), time.monotonic() + 60 * minutes, 0, 0
    while time.monotonic() < end:
        folder = tmp / f"{turn}"
        folder.mkdir()
        for label, function in cases(whole, folder, f"{seed}/{turn}"):
            watch.tries(f"seed {seed}/{turn}, {label}", function)
            for line in watch.found[shown:]:
                print(line, flush=True)
            shown = len(watch.found)
        kinds.shutil.rmtree(folder)
        turn += 1
    print(f"{turn} rounds: {watch.accepted} read, {watch.refused} refused in one line, {len(watch.found)} found")
    return 1 if watch.found else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2]))
