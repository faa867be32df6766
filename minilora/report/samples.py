"""Pictures of the data, drawn by PIL: grids per class, confident mistakes, unsure predictions."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FAINT = (32, 36, 44), (255, 255, 255), (232, 234, 238)


@dataclass
class Example:
    """One picture with what was true and what the model said, for grids and for the report page.

    `question` for VQA; `choices` (text, probability) for multiple choice. `correct` None: unknown
    or not a matter of right and wrong; by default truth and answer are compared.
    """

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
    """A normalised picture (3, H, W), tensor or array, back to PIL: value * std + mean,
    clipped to 0..1."""
    values = np.asarray(pixels.detach().float().cpu() if hasattr(pixels, "detach") else pixels, dtype=np.float32)
    mean, std = (np.asarray(preprocess[key], dtype=np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    rgb = np.clip(values * std + mean, 0, 1)
    return Image.fromarray((rgb.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def most_confident_mistakes(true, predicted, confidence, n: int = 12) -> list[int]:
    """Rows where the prediction is wrong, the surest first. All (N,); truth -1
    (unknown) is no mistake."""
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
) -> Image.Image:
    """Pictures in rows and columns with labels to the left and above; rows may differ in length."""
    font = ImageFont.load_default(13)
    left = min(120, max([0, *(int(font.getlength(label)) + 16 for label in row_labels)]))
    top = 26 * max([0, *(len(_wrapped(label, font, side)) for label in column_labels)])
    gap, columns = 6, max([1, *(len(row) for row in rows)])
    sheet = Image.new("RGB", (left + columns * (side + gap) + gap, top + len(rows) * (side + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(column_labels):
        for line, text in enumerate(_wrapped(label, font, side)):
            draw.text((left + gap + j * (side + gap), 5 + 18 * line), text, fill=INK, font=font)
    for i, row in enumerate(rows):
        y = top + gap + i * (side + gap)
        lines = _wrapped(row_labels[i], font, left - 10) if row_labels else []
        for line, text in enumerate(lines):
            draw.text((6, y + side // 2 - 9 * len(lines) + 18 * line), text, fill=INK, font=font)
        for j, image in enumerate(row):
            sheet.paste(square(image, side), (left + gap + j * (side + gap), y))
    return sheet


def sample_grid(samples: Mapping[str, Sequence[Image.Image]], side: int = 96) -> Image.Image:
    """{class: pictures} as a sheet with one row per class."""
    return picture_table(list(samples.values()), list(samples), side=side)


def example_grid(examples: Sequence[Example], columns: int = 4, side: int = 150) -> Image.Image:
    """Pictures with "truth" and "answer probability" below each, for a file beside the report."""
    font, gap, caption = ImageFont.load_default(12), 8, 38
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + caption + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, example in enumerate(examples):
        x, y = gap + number % columns * (side + gap), gap + number // columns * (side + caption + gap)
        sheet.paste(square(example.image, side) if example.image else Image.new("RGB", (side, side), FAINT), (x, y))
        sure = "" if example.probability is None else f"{100 * example.probability:.0f} % "
        colour = {True: (24, 120, 70), False: (190, 50, 40), None: INK}[example.correct]
        draw.text((x, y + side + 3), _cut(f"is {example.truth or 'unknown'}", font, side), fill=INK, font=font)
        draw.text((x, y + side + 19), _cut(f"said {sure}{example.answer}", font, side), fill=colour, font=font)
    return sheet


def data_uri(image: Image.Image, limit: int | None = None) -> str:
    """The picture as a data: URI, at most `limit` pixels wide and high; PNG where few
    colours, else JPEG."""
    image = image.convert("RGB")
    if limit and max(image.size) > limit:
        image.thumbnail((limit, limit))
    flat = image.getcolors(4096) is not None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True) if flat else image.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cut(text: str, font, width: float) -> str:
    """`text`, shortened with an ellipsis until it fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(label: str, font, width: float) -> list[str]:
    """The label on two lines at most, broken at a space."""
    words, first = label.split(" "), ""
    while words and (not first or font.getlength(f"{first} {words[0]}") <= width):
        first = f"{first} {words.pop(0)}".strip()
    return [_cut(first, font, width)] + ([_cut(" ".join(words), font, width)] if words else [])
