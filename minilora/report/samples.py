"""Pictures of the data: tables drawn by PIL, confident mistakes, unsure predictions."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minilora.textfiles import printable

INK, PAPER = (32, 36, 44), (255, 255, 255)


@dataclass
class Example:
    """One picture with what was true and what was said; `question` for VQA, `choices` (text,
    probability) for multiple choice. `correct`: None where truth is not known, by default whether
    the answer is the truth."""

    image: Image.Image | None
    truth: str
    answer: str
    probability: float | None = None
    question: str = ""
    choices: Sequence[tuple[str, float]] = ()
    name: str = ""
    correct: bool | None = None

    def __post_init__(self):
        if self.correct is None and self.truth:
            self.correct = self.truth == self.answer


def to_picture(pixels, preprocess: Mapping) -> Image.Image:
    """A normalised picture (3, H, W), tensor or array, to PIL: value * std + mean, within 0..1."""
    values = np.asarray(pixels.detach().float().cpu() if hasattr(pixels, "detach") else pixels, dtype=np.float32)
    mean, std = (np.asarray(preprocess[key], dtype=np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    rgb = np.clip(values * std + mean, 0, 1)
    return Image.fromarray((rgb.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def most_confident_mistakes(true, predicted, confidence, n: int = 12) -> list[int]:
    """Rows with a wrong prediction, the surest first; all (N,), truth -1 (unknown) is not one."""
    true, predicted, confidence = np.asarray(true), np.asarray(predicted), np.asarray(confidence)
    wrong = np.flatnonzero((true != predicted) & (true != -1))
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:n].tolist()


def least_sure(probabilities, n: int = 12) -> list[int]:
    """Rows of (N, K) whose two largest probabilities are nearest each other, the nearest first."""
    two = -np.partition(-np.asarray(probabilities, dtype=np.float64), 1, axis=1)[:, :2]  # (N, 2)
    return np.argsort(two[:, 0] - two[:, 1], kind="stable")[:n].tolist()


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, `side` pixels wide; small ones are enlarged without blur."""
    width = min(image.size)
    left, top = (image.width - width) // 2, (image.height - width) // 2
    middle = image.convert("RGB").crop((left, top, left + width, top + width))
    return middle.resize((side, side), Image.Resampling.NEAREST if width < side / 2 else Image.Resampling.BICUBIC)


def picture_table(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    side: int = 96,
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Pictures in rows and columns with labels to the left and above; rows may differ in length.
    captions: a line below each picture, "" for none."""
    font, gap, columns = ImageFont.load_default(14), 8, max([1, *(len(row) for row in rows)])
    labels = [printable(label[:500]) for label in row_labels]
    left = min(190, max([0, *(int(font.getlength(label)) + 18 for label in labels)]))
    heads = [_wrapped(printable(label[:500]), font, side, 3) for label in column_labels]
    top, below = 19 * max(map(len, heads), default=0) + 4, 20 * bool(captions)
    size = left + columns * (side + gap) + gap, top + len(rows) * (side + below + gap) + gap
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x: float, y: float, lines: Sequence[str]) -> None:
        for line, text in enumerate(lines):
            draw.text((x, y + 18 * line), text, fill=INK, font=font)

    for j, lines in enumerate(heads):
        write(left + gap + j * (side + gap), 4, lines)
    for i, row in enumerate(rows):
        y = top + gap + i * (side + below + gap)
        lines = _wrapped(labels[i], font, left - 12, side // 18) if labels else []
        write(6, y + side // 2 - 9 * len(lines), lines)
        for j, image in enumerate(row):
            x = left + gap + j * (side + gap)
            sheet.paste(square(image, side), (x, y))
            if captions and captions[i][j]:
                write(x, y + side + 2, [_cut(printable(captions[i][j]), font, side)])
    return sheet


def data_uri(image: Image.Image, limit: int | None = None) -> str:
    """The picture as a data: URI, `limit` pixels a side at most; PNG for few colours, else JPEG."""
    image = image.convert("RGB")
    if limit and max(image.size) > limit:
        image.thumbnail((limit, limit))
    flat = image.getcolors(4096) is not None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True) if flat else image.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cut(text: str, font, width: float) -> str:
    """`text`, shortened with an ellipsis until it fits."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[: int(width)]
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(label: str, font, width: float, most: int) -> list[str]:
    """The label on `most` lines at most, broken at spaces."""
    words, lines = label.split(), []
    while words and len(lines) < most - 1:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        lines.append(_cut(line, font, width))
    return lines + ([_cut(" ".join(words), font, width)] if words else [])
