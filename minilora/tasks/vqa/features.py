"""--cache-features: what a frozen tower says of a picture or a text, computed once and kept."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from minilora import ticker
from minilora.data.pictures.loader import in_order
from minilora.data.questions.vqa_batches import VQADataset, distinct, vqa_loader
from minilora.errors import UserError
from minilora.settings.values import TOWERS
from minilora.tasks.towers import frozen
from minilora.training.device import autocast, to_device


class FeatureCache:
    """Features of a task's frozen towers, in eval mode and float32, made for a part when its first
    batch is asked for. UserError where no tower is frozen."""

    def __init__(self, task):
        self.task, self.towers = task, [tower for tower in TOWERS if frozen(getattr(task.model, tower))]
        if not self.towers:
            raise UserError(
                "--cache-features keeps what a frozen tower says, but both towers are trained; use --mode linear, or "
                "adapt one tower: --target-modules text.q_proj text.v_proj"
            )
        self.kept: dict[str, dict[str, Tensor]] = {}

    def batches(self, part: str, batches: list[list[int]], epoch: int | None) -> Iterable[dict]:
        """The batches with image_features, text_features or both in their inputs' place."""
        task, data = self.task, self.task.data[part]
        if part not in self.kept:
            self.kept[part] = self.encode(data)
        if "vision" in self.towers:
            rows = (plain_batch(data, batch) for batch in batches)
        else:
            rows = vqa_loader(data, batches, epoch, task.workers)
        return (self.filled(batch, self.kept[part]) for batch in rows)

    def filled(self, batch: dict, kept: dict[str, Tensor]) -> dict:
        if "vision" in self.towers:
            batch["image_features"] = kept["vision"][batch["picture"]]
            batch["valid"] = kept["valid"][batch["picture"]][batch["image_index"]]
        if "text" in self.towers:
            batch["text_features"] = kept["text"][batch["text"]]
            batch = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
        return batch

    @torch.no_grad()
    def encode(self, data: VQADataset) -> dict[str, Tensor]:
        """vision (pictures, dv), text (texts, dt) and valid (pictures,) of a part."""
        training = self.task.model.training
        self.task.model.to(self.task.device).eval()
        with autocast(self.task.device, self.task.amp):
            kept = self.pictures(data) if "vision" in self.towers else {}
            kept |= {"text": self.texts(data)} if "text" in self.towers else {}
        self.task.model.train(training)
        return kept

    def pictures(self, data: VQADataset) -> dict[str, Tensor]:
        """Every picture that has a question through the picture tower, once; rows by its number."""
        task = self.task
        first = np.unique(data.picture, return_index=True)[1]
        batches = [first[rows].tolist() for rows in in_order(len(first), 2 * task.config.batch_size)]
        parts = []
        loader = vqa_loader(data, batches, None, task.workers)
        for batch in ticker.through(loader, "encoding pictures, batches", len(batches)):
            vision = task.model.encode_image(batch["image"].to(task.device)).float().cpu()
            parts.append((batch["picture"], vision, batch["valid"]))
        place, vision, valid = map(torch.cat, zip(*parts, strict=True))
        features = torch.zeros(int(data.picture.max()) + 1, vision.shape[1])
        readable = torch.zeros(len(features), dtype=torch.bool)
        features[place], readable[place] = vision, valid
        return {"vision": features, "valid": readable}

    def texts(self, data: VQADataset) -> Tensor:
        """Every distinct text through the text tower, similar lengths together."""
        task, texts = self.task, data.texts
        order = np.argsort([len(ids) for ids in texts.ids], kind="stable")
        parts = []
        batches = in_order(len(order), 4 * task.config.batch_size)
        for rows in ticker.through(batches, "encoding texts, batches"):
            inputs = to_device(texts.padded(order[rows].tolist()), task.device)
            parts.append(task.model.encode_text(**inputs).float().cpu())
        return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def plain_batch(data: VQADataset, numbers: list[int]) -> dict[str, Tensor]:
    """A batch without its pictures."""
    numbers = np.asarray(numbers, dtype=np.int64)
    return data.without_images(numbers, *distinct(data.picture[numbers]))


def grey_batches(data: VQADataset, batches: list[list[int]]) -> Iterator[dict[str, Tensor]]:
    """The batches with one grey picture for all questions: what is known without seeing."""
    for numbers in batches:
        batch = plain_batch(data, numbers)
        yield batch | {
            "image": torch.zeros(1, 3, data.size, data.size),
            "image_index": torch.zeros_like(batch["image_index"]),
            "valid": torch.ones(len(numbers), dtype=torch.bool),
        }
