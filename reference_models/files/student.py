"""Names and sizes of the students; only this library writes such files. See
load.py for the protocol."""

from reference_models.student import Student, StudentConfig

build = Student
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize": "squash"}


def names() -> list[str]:
    return ["student", "student-nano"]


def config_for(name: str) -> StudentConfig | None:
    """student (report R5's sizes) or student-nano; None where the name is of another family."""
    if name == "student-nano":
        return StudentConfig(name, image_size=48, vocab_size=4000, dim=64)
    return StudentConfig(name) if name == "student" else None
