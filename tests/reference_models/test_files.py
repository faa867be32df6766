"""Files that are written: whole or not at all, and readable for others as any new file is."""

import os

import pytest
import torch

from minilora import LoRAConfig, export_adapter, inject_lora, save_adapter
from minilora.commands.results import write_results
from minilora.settings.parse import read_run_config
from minilora.tasks import build_task
from minilora.tasks.runfiles import read_summary
from reference_models import ModelError, create_model, save_pretrained
from reference_models.files.hub import resolve
from reference_models.files.rename_adapter import convert
from reference_models.files.safetensors import read_safetensors, write_safetensors
from reference_models.text.bpe import ClipTokenizer
from reference_models.text.textfiles import read_json, replace_file
from tests.support.choice_data import MERGES, wordpiece
from tests.support.cli_data import QUICK, program, write_photos

VIT = "vit-nano-patch8-48"


def modes(folder) -> dict[str, str]:
    """{file: permissions} of everything below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in files}


@pytest.fixture(params=[0o022, 0o027])
def expected(request):
    """The permissions of a new file under this umask."""
    before = os.umask(request.param)
    yield oct(0o666 & ~request.param)
    os.umask(before)


def test_models_adapters_and_tokenizers_have_the_permissions_of_a_new_file(expected, tmp_path):
    for layout in ("minilora", "transformers", "timm", "torchvision"):
        save_pretrained(create_model(VIT), tmp_path / layout, layout)
    save_pretrained(create_model("clip-nano"), tmp_path / "open_clip", "open_clip")
    model = inject_lora(create_model(VIT), LoRAConfig(r=2, modules_to_save=("head",)))
    save_adapter(model, tmp_path / "adapter")
    export_adapter(model, tmp_path / "exported", "transformers5")
    convert(tmp_path / "exported", tmp_path / "converted", "transformers4")
    wordpiece().save(tmp_path / "bert")
    ClipTokenizer(MERGES).save(tmp_path / "clip")
    found = modes(tmp_path)
    assert {"minilora/model.safetensors", "converted/adapter_model.safetensors", "clip/merges.txt"} <= set(found)
    assert set(found.values()) == {expected}, found


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_all_files_of_a_run_have_the_permissions_of_a_new_file(mode, tmp_path):
    photos = write_photos(tmp_path / "photos", train=1, val=1)
    before = os.umask(0o022)
    try:
        words = [*QUICK, "--mode", mode, "--max-steps", "1", "--data-dir", str(photos)]
        assert program("train").main([*words, "--output", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    found = modes(tmp_path / "run")
    assert len(found) > 8 and set(found.values()) == {"0o644"}, found


def test_downloads_have_the_permissions_of_a_new_file(hub, expected):
    found = modes(resolve("hf:org/name"))
    assert len(found) >= 4 and set(found.values()) == {expected}, found


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"w": torch.ones(2)})

    def broken(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(file, broken)
    assert read_safetensors(file)["w"].tolist() == [1, 1] and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1,\n "b" 2}', "line 2: not valid JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not readable as JSON"),
        ('{"a": 1, "a": 2}', "key 'a': occurs twice"),
    ],
)
def test_bad_json_names_the_file_and_the_place(text, words, tmp_path):
    file = tmp_path / "vocab.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=f"vocab.json.*{words}"):
        read_json(file, unique=True)


def test_of_a_key_given_twice_config_json_has_the_last(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert read_json(tmp_path / "config.json") == {"a": 2}


def test_a_test_loss_that_is_no_number_does_not_make_a_summary_look_damaged(tmp_path):
    """A test set of which no answer is known has no loss; the run must open all the same."""
    photos = write_photos(tmp_path / "photos", train=1, val=1)
    run_dir = tmp_path / "run"
    words = [*QUICK, "--mode", "linear", "--max-steps", "1", "--data-dir", str(photos)]
    assert program("train").main([*words, "--output", str(run_dir)]) == 0
    task = build_task(read_run_config(run_dir)[0])
    result = read_summary(run_dir)
    write_results(task, run_dir, result, {"loss": float("nan"), "accuracy": 0.5}, torch.device("cpu"))
    assert read_summary(run_dir)["test"] == {"loss": None, "accuracy": 0.5}
