"""The bundled clip-nano: small, made by one seeded command, and it knows something before any fine-tuning."""

import pytest
import torch

from minilora.commands.pretrain import pretrain, start_vision
from minilora.data.generated.captions import PART, Captions, caption_vocabulary
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import parse_args
from minilora.tasks import build_task
from minilora.tasks.choice.run import zero_shot
from minilora.training.trainer import Trainer, TrainOptions
from reference_models import create_model, load_pretrained
from reference_models.load import bundled_weights
from reference_models.text.tokenizers import load_tokenizer
from reference_models.text.wordpiece import build_wordpiece_vocab
from tests.support.cli_data import program

FOLDER = bundled_weights("clip-nano")


def zero_shot_accuracy(capsys) -> float:
    assert program("evaluate").main(["--task", "choice", "--model", "clip-nano", "--data-format", "shapes"]) == 0
    return float(capsys.readouterr().out.split("accuracy ")[1].split()[0]) / 100


def test_bundled_weights_fit_in_4_mb_and_are_half_precision():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4e6
    model = load_pretrained("clip-nano", FOLDER)
    assert model.config.eos_token_id == load_tokenizer(FOLDER).eos_id
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_vocabulary_is_the_one_that_the_texts_give_and_knows_the_words():
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer.tokens == build_wordpiece_vocab(caption_vocabulary(), 4000)
    for text in ("a photo of a magenta star.", "Question: what is left of the heart? Answer: triangle"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.lower().replace(" ", "")
        assert len(tokenizer.encode(text)) == 2 + len(tokenizer.words(text))  # a word is a token


def test_captions_say_what_is_there_and_sometimes_a_part_of_it():
    captions = Captions("train", 300, seed=1)
    parts = 0
    for i in range(300):
        things = captions.things(i)
        named = [str(thing) in captions.caption(i) for thing in things]
        assert any(named)
        parts += not all(named)
    assert 0.3 < parts / 300 / PART < 0.8  # of two things one is left out; about half of the pictures show one
    assert captions.caption(5) == Captions("train", 300, seed=1).caption(5)


def test_zero_shot_is_above_35_percent(capsys):
    assert zero_shot_accuracy(capsys) >= 0.35


def test_questions_about_a_grey_picture_stay_near_chance():
    config, _ = parse_args(["--task", "choice", "--device", "cpu"])
    task = build_task(config)
    batch = next(iter(task.loader("val", [range(400)])))
    batch["image"] = torch.zeros_like(batch["image"])
    assert task.loss(task.model.eval(), batch)[1]["correct"] / 400 < 0.33


def test_the_picture_tower_starts_as_vit_nano():
    clip, vit = (
        create_model("clip-nano"),
        load_pretrained("vit-nano-patch8-48", bundled_weights("vit-nano-patch8-48")),
    )
    start_vision(clip, torch.randn(2, 3, 48, 48))
    assert torch.equal(clip.vision.blocks[3].mlp.fc2.weight, vit.blocks[3].mlp.fc2.weight)
    patches = clip.vision.patch_embed(torch.ones(1, 3, 48, 48)) + clip.vision.pos_embed[:, 1:]
    wanted = vit.patch_embed(torch.ones(1, 3, 48, 48)) + vit.pos_embed[:, 1:]
    torch.testing.assert_close(patches, wanted)


def test_pretraining_runs_and_is_seeded(tmp_path):
    for name in ("a", "b"):
        pretrain("clip-nano", tmp_path / name, steps=2)
    a, b = (load_pretrained("clip-nano", tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert load_tokenizer(tmp_path / "a").vocab == load_tokenizer(FOLDER).vocab


@pytest.mark.slow
def test_lora_gains_at_least_15_points_over_zero_shot(capsys, tmp_path):
    before = zero_shot_accuracy(capsys)
    config, _ = parse_args(["--task", "choice", "--device", "cpu"])
    task = build_task(config)
    options = TrainOptions(epochs=config.epochs, lr=config.lr, warmup_ratio=config.warmup_ratio)
    result = Trainer(task, options, tmp_path, "cpu").fit()
    assert result["best"]["accuracy"] >= before + 0.15


def test_zero_shot_takes_the_flags_as_the_command_line_does(tmp_path):
    config, _ = parse_args(["--task", "choice", "--model", "clip-nano", "--prompt", "{question} {choice}"])
    text = zero_shot(config, EvalConfig(split="test"), torch.device("cpu"))
    assert text.startswith("clip-nano, zero-shot, test, 791 questions\naccuracy ")
