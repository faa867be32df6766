"""Small sets of questions in the files of VQA v2, for the tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def records(pictures: int, start: int = 0, answers: int = 1) -> tuple[list[dict], list[dict]]:
    """Three questions for each picture, and their annotations with one or ten answers."""
    questions, annotations = [], []
    for i in range(start, start + pictures):
        colour = list(COLOURS)[i % 3]
        asked = [
            ("What's the color of it?", colour, "what", "other"),
            (f"is it {list(COLOURS)[(i + i // 3) % 3]}?", "yes" if i // 3 % 3 == 0 else "no", "is it", "yes/no"),
            (f"how many things are there in picture {i % 5}?", "1", "how many", "number"),
        ]
        for k, (text, answer, kind, answer_type) in enumerate(asked):
            said = [{"answer": answer, "answer_confidence": "yes", "answer_id": n + 1} for n in range(answers)]
            questions.append({"question_id": 10 * i + k, "image_id": i, "question": text})
            annotations.append(
                {
                    "question_id": 10 * i + k,
                    "image_id": i,
                    "question_type": kind,
                    "answer_type": answer_type,
                    "multiple_choice_answer": answer,
                    "answers": said,
                }
            )
    return questions, annotations


def write_pictures(folder: Path, numbers, name: str = "picture_{:012d}.png", size: int = 48) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        noise = np.random.default_rng(i).integers(-20, 20, (size, size, 3))
        pixels = np.clip(np.array(list(COLOURS.values())[i % 3]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name.format(i))


def write_json(path: Path, key: str, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, key: rows}))


def write_vqa(root: Path, train: int = 12, val: int = 6, answers: int = 1, size: int = 48) -> Path:
    """train and val in the easy layout; image ids start from 0 in both."""
    for part, pictures in (("train", train), ("val", val)):
        questions, annotations = records(pictures, 0, answers)
        write_json(root / f"{part}_questions.json", "questions", questions)
        write_json(root / f"{part}_annotations.json", "annotations", annotations)
        write_pictures(root / part, range(pictures), size=size)
    return root
