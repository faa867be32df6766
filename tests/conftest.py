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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in small, to which `hf:` leads, with an empty cache."""
    from reference_models.files import download as download_module
    from tests.support.hub_server import Hub

    server = Hub()
    monkeypatch.setattr(download_module, "WAIT", 0)
    monkeypatch.setattr(download_module, "TIMEOUT", 5)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_REVISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
