"""Make the bundled nano weights: small models trained from nothing on the procedural source tasks.

    python -m minilora.commands.pretrain vit-nano     # the official weights, some minutes
    python -m minilora.commands.pretrain vit-nano --steps 20 --output /tmp/nano   # a quick look

Each model is one function below; what they share is the loop `fit`. Source tasks differ from the
demonstrations' (other shapes, other colours), so that fine-tuning has something to adapt.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from minilora.atomic import write_json
from minilora.data.generated.captions import Captions, caption_vocabulary
from minilora.data.generated.sentences import Sentences, vocabulary_texts
from minilora.data.generated.shapes import ShapesSplit, task_classes
from minilora.data.pictures.loader import in_order, mix, seeded_cpu
from minilora.data.pictures.transforms import Normalise
from minilora.training.optim import schedule_factor
from reference_models import create_model, load_pretrained, save_pretrained
from reference_models.text.tokenizers import WordPieceTokenizer, build_wordpiece_vocab

WEIGHTS = Path(__file__).parents[2] / "reference_models" / "weights"


@dataclass(frozen=True)
class Plan:
    """How long and how fast: AdamW with linear warm-up and a cosine to zero."""

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    seed: int = 0


def fit(model: nn.Module, loss_of: Callable[[range], Tensor], plan: Plan) -> None:
    """Train all of `model`. `loss_of(numbers)` is the loss of these samples; none comes twice."""
    optimizer = torch.optim.AdamW(model.parameters(), plan.lr, weight_decay=plan.weight_decay, fused=True)
    warm = max(1, round(plan.warmup * plan.steps))
    schedule = LambdaLR(optimizer, lambda step: schedule_factor("cosine", step, plan.steps, warm))
    model.train()
    start, recent = time.time(), None
    for step in range(plan.steps):
        loss = loss_of(range(step * plan.batch_size, (step + 1) * plan.batch_size))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if recent is None else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            speed = (step + 1) * plan.batch_size / (time.time() - start)
            print(f"step {step + 1}/{plan.steps} loss {recent:.4f} samples/s {speed:.0f}", flush=True)
    model.eval()


def batch_of(split: ShapesSplit, normalise: Normalise, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) float32 pictures and (B,) labels of the shapes with these numbers."""
    pixels = torch.stack([torch.from_numpy(split.pixels(i)) for i in indices])
    return normalise(pixels.permute(0, 3, 1, 2)), torch.tensor([split[i].label for i in indices])


@torch.no_grad()
def accuracy(model: nn.Module, split: ShapesSplit, normalise: Normalise) -> float:
    """Share of right answers, in percent."""
    right = 0
    for indices in in_order(len(split), 100):
        images, labels = batch_of(split, normalise, indices)
        right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(split)


def vit_nano(plan: Plan) -> tuple[nn.Module, dict]:
    """48-way colour x shape. 829,104 parameters: 48 pixels, patches of 8, width 128, 4 blocks."""
    model = create_model("vit-nano-patch8-48", num_classes=48)
    normalise = Normalise(model.preprocess)
    train = ShapesSplit("source", "train", plan.seed, range(plan.steps * plan.batch_size))

    def loss_of(numbers: range) -> Tensor:
        images, labels = batch_of(train, normalise, numbers)
        return nn.functional.cross_entropy(model(images), labels)

    fit(model, loss_of, plan)
    model.labels = task_classes("source")
    score = accuracy(model, ShapesSplit("source", "val", plan.seed, range(1920)), normalise)
    return model, {"task": "48 classes: 6 colours x 8 shapes", "accuracy": round(score, 2)}


class SentenceModel(nn.Module):
    """A text encoder with two tasks that are left behind: masked pieces from their surroundings,
    and all pieces of a sentence from its pooled vector, which later has to say what was asked."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        dim, pieces = bert.config.dim, bert.config.vocab_size
        self.bert = bert
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias, self.bag = nn.Parameter(torch.zeros(pieces)), nn.Linear(dim, pieces)

    def forward(self, ids: Tensor, masked: Tensor, attention_mask: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
        """ids, masked, attention_mask (B, T) -> scores of M masked pieces (M, V), of all (B, V)."""
        hidden, pooled = self.bert(ids.masked_fill(masked, mask_id), attention_mask)
        decoder = self.bert.embeddings.word.weight
        return nn.functional.linear(self.transform(hidden[masked]), decoder, self.bias), self.bag(pooled)


def sentence_batch(tokenizer: WordPieceTokenizer, sentences: Sentences, numbers: range) -> tuple[Tensor, ...]:
    """ids, attention_mask (B, T) int64, masked (B, T) bool: 15 % of the pieces, none special."""
    texts = tokenizer([sentences[i] for i in numbers], max_length=32)
    ids, attention_mask = texts["input_ids"], texts["attention_mask"]
    with seeded_cpu(mix(sentences.seed, numbers.start)):
        drawn = torch.rand(ids.shape) < 0.15
    special = (ids == tokenizer.cls_id) | (ids == tokenizer.eos_id) | (ids == tokenizer.pad_id)
    return ids, attention_mask, drawn & ~special


def bert_nano(plan: Plan) -> tuple[nn.Module, dict]:
    """Masked pieces, bags of pieces over generated English. 3 blocks of width 128, 2,911 pieces."""
    tokenizer = WordPieceTokenizer(build_wordpiece_vocab(vocabulary_texts(), 4000), max_length=64)
    bert = create_model("bert-nano", vocab_size=tokenizer.vocab_size)
    model, sentences, mask_id = SentenceModel(bert), Sentences(plan.seed), tokenizer.vocab["[MASK]"]

    def loss_of(numbers: range) -> Tensor:
        ids, attention_mask, masked = sentence_batch(tokenizer, sentences, numbers)
        scores, bag = model(ids, masked, attention_mask, mask_id)
        wanted = torch.zeros_like(bag).scatter_(1, ids, 1.0)
        wanted[:, [tokenizer.cls_id, tokenizer.eos_id, tokenizer.pad_id]] = 0.0
        whole = -(bag.log_softmax(1) * wanted).sum(1) / wanted.sum(1)
        return nn.functional.cross_entropy(scores, ids[masked]) + whole.mean()

    fit(model, loss_of, plan)
    with torch.no_grad():
        ids, attention_mask, masked = sentence_batch(tokenizer, Sentences(plan.seed + 1), range(2000))
        scores, _ = model(ids, masked, attention_mask, mask_id)
        right = (scores.argmax(1) == ids[masked]).float().mean().item()
    bert.tokenizer = tokenizer
    record = {"task": "masked pieces, and all pieces from the pooled vector", "accuracy": round(100 * right, 2)}
    return bert.half(), record


def start_vision(clip: nn.Module, pictures: Tensor) -> None:
    """Let the picture tower of CLIP begin as vit-nano, which knows colours and shapes already.

    What differs: the patches' bias, which goes into the positions, and CLIP's norm before the
    blocks, which gets the size that vit-nano's tokens have on `pictures` (B, 3, S, S).
    """
    vit, tower = load_pretrained("vit-nano-patch8-48"), clip.vision
    with torch.no_grad():
        vit.pos_embed[:, 1:] += vit.patch_embed.proj.bias
        state = {key: tensor for key, tensor in vit.state_dict().items() if key in tower.state_dict()}
        tower.load_state_dict(state | {f"norm_pre.{key}": p for key, p in tower.norm_pre.state_dict().items()})
        tokens = tower.patch_embed(pictures) + tower.pos_embed[:, 1:]  # (B, P, d)
        tower.norm_pre.weight.fill_(tokens.std(-1).mean().item())


def clip_nano(plan: Plan) -> tuple[nn.Module, dict]:
    """Pictures and captions find each other: cross entropy over the cosines of a batch, both ways
    (CLIP, section 2). The picture tower starts from vit-nano. What two pictures have as caption is
    right for both."""
    tokenizer = WordPieceTokenizer(build_wordpiece_vocab(caption_vocabulary(), 4000), max_length=77)
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
    model = create_model("clip-nano", **sizes)
    normalise, scenes = Normalise(model.preprocess), Captions("train", plan.steps * plan.batch_size, plan.seed)

    def batch(source: Captions, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        numbers = list(numbers)
        pixels = torch.stack([torch.from_numpy(source.pixels(i)) for i in numbers])
        ids = tokenizer([source.caption(i) for i in numbers])["input_ids"]
        return normalise(pixels.permute(0, 3, 1, 2)), ids

    start_vision(model, batch(scenes, range(16))[0])

    def loss_of(numbers: range) -> Tensor:
        images, ids = batch(scenes, numbers)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        per_image, per_text = model(images, ids)
        target = (ids[:, None] == ids).all(-1).float()  # (B, B)
        target /= target.sum(1, keepdim=True)
        return (nn.functional.cross_entropy(per_image, target) + nn.functional.cross_entropy(per_text, target)) / 2

    fit(model, loss_of, plan)
    with torch.no_grad():
        val = Captions("val", 500, plan.seed)
        found = [model(*batch(val, rows))[0].argmax(1) for rows in in_order(500, 50)]
    right = torch.cat(found).view(10, 50) == torch.arange(50)
    model.tokenizer = tokenizer
    score = round(100 * right.float().mean().item(), 2)
    return model.half(), {"task": "pictures and captions, 1 of 50", "accuracy": score}


RECIPES: dict[str, tuple[Callable[[Plan], tuple[nn.Module, dict]], Plan, str]] = {
    "vit-nano": (vit_nano, Plan(steps=1800, lr=1.5e-3), "vit-nano-patch8-48"),
    "clip-nano": (clip_nano, Plan(steps=600, lr=1.5e-3), "clip-nano"),
    "bert-nano": (bert_nano, Plan(steps=1600, batch_size=128, lr=2e-3), "bert-nano"),
}


def pretrain(name: str, output: Path | None = None, steps: int | None = None) -> None:
    """Train the nano model `name` and write it to `output`, with a record of the training."""
    recipe, plan, folder = RECIPES[name]
    plan = replace(plan, steps=steps or plan.steps)
    output = output or WEIGHTS / folder
    torch.manual_seed(plan.seed)
    start = time.time()
    model, record = recipe(plan)
    record |= {"samples": plan.steps * plan.batch_size, "seconds": round(time.time() - start), "seed": plan.seed}
    save_pretrained(model, output)
    if hasattr(model, "tokenizer"):
        model.tokenizer.save(output)
    config = json.loads((output / "config.json").read_text())
    write_json(output / "config.json", config | {"pretraining": record})
    print(f"{name}: {json.dumps(record)} -> {output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.commands.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES), help="the model to make")
    parser.add_argument("--output", type=Path, help="folder to write to (default: where the bundled weights lie)")
    parser.add_argument("--steps", type=int, help="train for fewer steps, to try it out")
    options = parser.parse_args(argv)
    pretrain(options.name, options.output, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
