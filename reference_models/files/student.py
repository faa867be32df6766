"""The students; only this library writes such files. See load.py for the protocol."""

from reference_models.student import Student, StudentConfig

build = Student
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize": "squash"}

MODELS = {
    "student": StudentConfig("student"),  # report R5's sizes
    "student-nano": StudentConfig("student-nano", image_size=48, vocab_size=4000, dim=64),
}
names, config_for = list(MODELS), MODELS.get
