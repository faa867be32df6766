"""Shared fixtures: where the real data lies, and one thread so that small tests do not fight for cores."""

import os
from pathlib import Path

import pytest
import torch


def shared_folder() -> Path:
    """The real pictures, vocabularies and weights: $MINILORA_SHARED, else ../shared/data beside the project."""
    return Path(os.environ.get("MINILORA_SHARED", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set MINILORA_SHARED to the folder that holds it")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
