"""Shared fixtures: where the real data lies, and one thread so that small tests do not fight for cores."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for this process and those that tests start

import pytest  # noqa: E402
import torch  # noqa: E402


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
