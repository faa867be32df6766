"""A CLIP made of any two encoders, and SigLIP, in both tasks: what is trained, runs opened again, files that
transformers loads; text towers of other families in the third.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional as F

from minilora.errors import UserError
from minilora.inject import lora_state_dict
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import parse_args
from minilora.tasks import build_task, load_run
from minilora.tasks.towers import text_limit
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.load import bundled_weights
from reference_models.text.tokenizers import load_tokenizer
from tests.support.choice_data import write_scpc
from tests.support.cli_data import program, write_photos
from tests.support.parity import BOUNDS, distance, fill, pictures
from tests.support.vqa_data import write_vqa

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


# ---- SigLIP: texts filled up to its context, a bias, a loss of its own


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small SiglipModel in a folder, with the nano models' vocabulary."""
    folder = tmp_path_factory.mktemp("siglip")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**tower, "vocab_size": 4000, "max_position_embeddings": 24}
    config = transformers.SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})
    fill(transformers.SiglipModel(config)).save_pretrained(folder)
    load_tokenizer(bundled_weights("bert-nano")).save(folder)
    return folder


def siglip_task(folder, data, *more):
    words = [word for word in words_of(data, *more) if word not in PAIR]
    words.insert(words.index("--model") + 1, str(folder))
    return build_task(parse_args(words)[0])


def filled(folder, texts):
    """The ids as transformers' processor makes them with padding="max_length"."""
    return load_tokenizer(folder)(texts, padding=24)["input_ids"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_sigmoid_loss_of_choices_is_that_of_transformers_logits(siglip, scpc, smoothing):
    task = siglip_task(siglip, scpc, "--mode", "full", "--smoothing", str(smoothing))
    model, batch = task.model.double(), first_batch(task)
    batch["image"] = batch["image"].double()
    theirs = transformers.SiglipModel.from_pretrained(siglip, dtype=torch.float64)
    rows = []
    for picture, ids in zip(batch["picture"], batch["input_ids"], strict=True):
        assert ids.shape == (4, 24), "a text has all positions, and padding is seen"
        images = batch["image"][picture : picture + 1]
        rows.append(theirs(pixel_values=images, input_ids=ids).logits_per_image[0])
    wanted = torch.stack(rows)
    assert distance(task.predictor.logits(model, batch), wanted) < BOUNDS[torch.float64]
    right = F.one_hot(batch["label"], 4) * (1 - smoothing) + smoothing / 4
    each = -right * F.logsigmoid(wanted) - (1 - right) * F.logsigmoid(-wanted)
    loss, _ = task.loss(model, batch)
    torch.testing.assert_close(loss, each.sum(1).mean().to(loss), rtol=1e-5, atol=0)
    loss.backward()
    each.sum(1).mean().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    names = {e.ours[0]: e.theirs for e in model.key_table("transformers5") if e.form == "same"}
    for name in ("text.blocks.0.mlp.fc1.weight", "text_projection.bias", "vision.blocks.1.attn.v_proj.weight"):
        ours = model.get_parameter(name).grad
        assert (ours - grads[names[name]]).abs().max() <= 1e-5 * grads[names[name]].abs().max(), name
    torch.testing.assert_close(model.logit_bias.grad, grads["logit_bias"][0], rtol=1e-5, atol=0)


def test_class_names_have_the_logits_of_siglip(siglip, photos):
    task = siglip_task(siglip, photos)
    assert task.zero_shot()["accuracy"] >= 0  # it knew both before
    batch = first_batch(task)
    texts = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name.replace('_', ' ')}." for name in task.labels]
    theirs = transformers.SiglipModel.from_pretrained(siglip, dtype=torch.float64).eval()
    with torch.no_grad():
        wanted = theirs(pixel_values=batch["image"].double(), input_ids=filled(siglip, texts)).logits_per_image
        ours = task.predictor.logits(task.model.double().eval(), batch | {"image": batch["image"].double()})
    assert distance(ours, wanted) < BOUNDS[torch.float64]


@pytest.mark.parametrize("mode", ["lora", "linear"])
def test_a_run_of_siglip_is_opened_again_and_merged_to_transformers(siglip, scpc, mode, tmp_path):
    words = [word for word in words_of(scpc, "--mode", mode, "--lr", "0.02") if word not in PAIR]
    words.insert(words.index("--model") + 1, str(siglip))
    assert program("train").main([*words, "--output", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert run.evaluate(EvalConfig(amp="fp32")).scores["accuracy"] == pytest.approx(best["accuracy"])
    merge = [str(tmp_path / "run"), "--merge-to", str(tmp_path / "merged"), "--layout", "transformers"]
    assert program("evaluate").main(merge) == 0
    theirs = transformers.SiglipModel.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    ours, x = load_run(tmp_path / "run").model.double(), pictures(32, 2).double()
    ids = filled(siglip, ["what is it? a cat", "a dog"])
    with torch.no_grad():
        wanted = theirs(pixel_values=x, input_ids=ids).logits_per_image
        assert distance(ours(x, ids)[0], wanted) < 10 * BOUNDS[torch.float32]


@pytest.mark.parametrize("fill, limit", [(True, 24), (None, 16)])
def test_a_tokenizers_length_shortens_texts_only_where_they_are_not_filled_up(fill, limit):
    tokenizer = SimpleNamespace(fill=fill, max_length=16)
    assert text_limit(SimpleNamespace(name="text", max_positions=24), tokenizer, None) == limit


def test_a_siglip_reads_no_shorter_texts(siglip, scpc):
    with pytest.raises(UserError, match="--max-length 20: .* reads 24 tokens; leave it out"):
        siglip_task(siglip, scpc, "--max-length", "20")


# ---- text towers of other families answer questions


def text_folder(folder, name, pad):
    """A small encoder with random weights and a vocabulary whose padding has the id `pad`."""
    tokens = list(load_tokenizer(bundled_weights("bert-nano")).vocab)
    tokens.remove("[PAD]")
    tokens.insert(pad, "[PAD]")
    sizes = {"dim": 32, "depth": 2, "heads": 4, "hidden": 48, "vocab_size": 4000}
    save_pretrained(create_model(name, **sizes), folder, "transformers")
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


@pytest.mark.parametrize("task", ["vqa", "choice"])
@pytest.mark.parametrize("name, pad", [("roberta-base", 1), ("distilbert-base", 0), ("mpnet-base", 1), ("siglip", 0)])
def test_text_towers_of_every_family_train_and_are_opened_again(name, pad, task, siglip, scpc, tmp_path):
    folder = siglip if name == "siglip" else text_folder(tmp_path / "text", name, pad)
    words = [*QUICK, "--task", task, "--model", PAIR[0], f"text={folder}", "--output", str(tmp_path / "run")]
    words += ["--data-dir", str(scpc)] if task == "choice" else ["--data-dir", str(write_vqa(tmp_path / "vqa"))]
    assert program("train").main(words) == 0
    run = load_run(tmp_path / "run")
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert run.evaluate(EvalConfig(amp="fp32")).scores["accuracy"] == pytest.approx(best["accuracy"])


def test_a_vocabulary_that_pads_with_another_token_is_refused(scpc, tmp_path):
    folder = text_folder(tmp_path / "text", "roberta-base", 0)
    words = [*QUICK, "--task", "choice", "--model", PAIR[0], f"text={folder}", "--data-dir", str(scpc)]
    with pytest.raises(UserError, match="pads with token 0, .* takes 1 for padding"):
        build_task(parse_args(words)[0])
