"""A CLIP made of any two encoders, in both tasks: what is trained, runs opened again, files that transformers loads."""

import json
import shutil

import pytest
import torch
import transformers
from torch.nn import functional as F

from minilora.errors import UserError
from minilora.inject import lora_state_dict
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import parse_args
from minilora.tasks import build_task, load_run
from reference_models import ModelError, load_pretrained, save_pretrained
from reference_models.load import bundled_weights
from reference_models.text.tokenizers import load_tokenizer
from tests.support.choice_data import write_scpc
from tests.support.cli_data import program, write_photos
from tests.support.parity import BOUNDS, distance

PAIR = ["vision=vit-nano-patch8-48", "text=bert-nano"]
QUICK = ["--batch-size", "8", "--epochs", "1", "--device", "cpu", "--workers", "0", "--amp", "fp32"]
NEW = {"logit_scale", "visual_projection.weight", "text_projection.weight"}


@pytest.fixture(scope="module")
def scpc(tmp_path_factory):
    return write_scpc(tmp_path_factory.mktemp("scpc"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=6, val=4)


def words_of(data, *more):
    task = ["--task", "choice"] if (data / "train.csv").is_file() else []
    return [*QUICK, *task, "--model", *PAIR, "--data-dir", str(data), *more]


def task_of(data, *more):
    return build_task(parse_args(words_of(data, *more))[0])


def first_batch(task):
    return next(iter(task.train_loader(0, task.train_batches(0))))


@pytest.mark.parametrize("data", ["scpc", "photos"])
def test_projections_and_scale_are_trained_beside_lora_in_both_towers(data, request):
    task = task_of(request.getfixturevalue(data))
    task.loss(task.model, first_batch(task))[0].backward()
    trained = lora_state_dict(task.model)
    assert {name for name in trained if ".lora_" not in name} == NEW
    assert {name.partition(".")[0] for name in trained if ".lora_" in name} == {"vision", "text"}
    assert all(task.model.get_parameter(name).grad is not None for name in trained)
    assert task.zero_shot() is None  # new projections know nothing
    linear = task_of(request.getfixturevalue(data), "--mode", "linear", "--cache-features")
    linear.loss(linear.model, first_batch(linear))[0].backward()
    assert set(lora_state_dict(linear.model)) == NEW


def test_padding_changes_no_choice(scpc):
    task = task_of(scpc, "--text-pooling", "mean")
    batch = first_batch(task)
    wider = {key: F.pad(batch[key], (0, 5)) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [task.predictor.logits(task.model.eval(), one) for one in (batch, batch | wider)]
    assert distance(*logits) < BOUNDS[torch.float32]
    lengths = batch["attention_mask"].sum(-1)
    assert lengths.min() < lengths.max() and (batch["input_ids"][batch["attention_mask"] == 1] > 0).all()


@pytest.fixture(scope="module")
def run(scpc, tmp_path_factory):
    """A run whose text tower is a folder of its own."""
    root = tmp_path_factory.mktemp("dual")
    save_pretrained(load_pretrained("bert-nano"), root / "bert", "transformers")
    load_tokenizer(bundled_weights("bert-nano")).save(root / "bert")
    model = ["--model", PAIR[0], f"text={root / 'bert'}", "--lr", "0.02"]
    assert program("train").main([*words_of(scpc), *model, "--output", str(root / "run")]) == 0
    return root / "run"


def test_the_run_is_opened_again_with_the_scores_of_its_training(run, scpc):
    best = json.loads((run / "summary.json").read_text())["best"]
    assert load_run(run).evaluate(EvalConfig(amp="fp32")).scores["accuracy"] == pytest.approx(best["accuracy"])


def test_a_text_folder_that_was_moved_is_named_anew(run, tmp_path):
    shutil.copytree(run.parent, tmp_path / "moved")
    shutil.move(run.parent / "bert", run.parent / "gone")
    try:
        with pytest.raises(UserError, match="are gone; say where they are now with --weights"):
            load_run(tmp_path / "moved" / "run")
        found = load_run(tmp_path / "moved" / "run", weights={"text": str(tmp_path / "moved" / "bert")})
    finally:
        shutil.move(run.parent / "gone", run.parent / "bert")
    ids = {key: tensor for key, tensor in found.tokenizer(["a cat", "the dog"]).items() if key != "token_type_ids"}
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(found.model(x, **ids)[0], load_run(run).model(x, **ids)[0])


def predictions(found, model, batch):
    return found.predictor.logits(model, batch | {"image": batch["image"].double()})


def test_the_merged_run_answers_in_transformers_as_here(run, scpc, tmp_path):
    out = tmp_path / "out"
    assert program("evaluate").main([str(run), "--merge-to", str(out), "--layout", "transformers"]) == 0
    theirs = transformers.VisionTextDualEncoderModel.from_pretrained(out, dtype=torch.float64).eval()
    found, merged, batch = load_run(run), load_pretrained(out).double().eval(), first_batch(task_of(scpc))
    with torch.no_grad():
        # the merged weights were rounded once
        torch.testing.assert_close(found.logits(batch).double(), predictions(found, merged, batch), rtol=1e-4, atol=0)
        for row, ours in enumerate(predictions(found, merged, batch)):
            text = {key: batch[key][row] for key in ("input_ids", "attention_mask")}
            image = batch["image"][batch["picture"][row]][None].double()
            assert distance(ours, theirs(pixel_values=image, **text).logits_per_image[0]) < BOUNDS[torch.float64]
    assert program("evaluate").main(["--model", str(out), "--task", "choice", "--data-dir", str(scpc)]) == 0


def test_class_names_with_two_encoders_answer_and_keep_their_text_pooling(photos, tmp_path, capsys):
    words = words_of(photos, "--text-pooling", "mean", "--output", str(tmp_path / "run"))
    assert program("train").main(words) == 0
    assert "zero-shot" not in capsys.readouterr().out
    found = load_run(tmp_path / "run")
    assert found.config.text_pooling == found.model.text.config.pooling == "mean"
    picture = next((photos / "val" / "class_1").iterdir())
    assert {name for name, _ in found.predict([picture])[0]} == {"class_0", "class_1", "class_2"}
    with pytest.raises(ModelError, match="the mean of the tokens; use layout 'minilora'"):
        program("evaluate").main([str(tmp_path / "run"), "--merge-to", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "clip-nano", "--text-pooling", "mean"], "clip-nano has one vector of a text"),
        (["--weights", "somewhere"], "which tower is it for?"),
        (["--model", "vision=vit-nano-patch8-48", "text=bert-nanoo"], "unknown model 'bert-nanoo'"),
        (["--model", "vision=vit-nano-patch8-48", "text=bert-tiny", "--weights", "none"], "--tokenizer is missing"),
        (["--tokenizer", "vocab"], "vocab"),
    ],
)
def test_a_pair_that_cannot_be_made_is_named(words, told, scpc):
    with pytest.raises((UserError, ModelError)) as error:
        task_of(scpc, *words)
    assert told in str(error.value)
