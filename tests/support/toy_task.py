"""A task of a second for the tests of minilora/training: an MLP with dropout on noisy points of four classes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from minilora.data.pictures.loader import make_loader
from minilora.training.distributed import gather_objects, rank, world_size


class NoisyPoints(Dataset):
    """Point i as seen in epoch e: the noise depends on (seed, e, i) alone, as augmentation does."""

    def __init__(self, n: int, seed: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 4, (n,), generator=generator)
        self.points = torch.randn(n, 6, generator=generator) + F.one_hot(self.labels, 6) * 2.0
        self.seed, self.noise = seed, noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int] | int) -> dict:
        epoch, i = key if isinstance(key, tuple) else (None, key)
        x = self.points[i]
        if epoch is not None and self.noise:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((self.seed, epoch, i)))
                x = x + self.noise * torch.randn(6)
        return {"x": x, "label": self.labels[i], "index": i}


def collate(items: list[dict]) -> dict:
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


class ToyModel(nn.Module):
    """6 -> 16 -> dropout -> 4, with a BatchNorm so that there are buffers to keep."""

    head_modules = ("head",)

    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 16)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.body = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.frozen(x)))  # (B, 16)
        return self.head(self.dropout(torch.relu(self.body(x))))  # (B, 4)


class ToyTask:
    """The protocol of minilora/tasks/task.py in its smallest form."""

    mode, metric = "full", "accuracy"

    def __init__(self, n=22, batch_size=4, seed=0, dropout=0.3, noise=0.5, workers=0, norm=True, poison=(), after=None):
        torch.manual_seed(seed)
        self.model = ToyModel(dropout, norm)
        self.data, self.validation = NoisyPoints(n, seed, noise), NoisyPoints(21, seed + 1, 0.0)
        self.seed, self.batch_size, self.workers = seed, batch_size, workers
        self.poison = set(poison)  # items whose loss is NaN
        self.after = after  # called with each batch number: tests interrupt a run with it
        self.losses = 0

    def train_batches(self, epoch, times=1):
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        size = times * self.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def train_loader(self, epoch, batches):
        keys = [[(epoch, i) for i in batch] for batch in batches]
        return make_loader(self.data, keys, self.workers, collate)

    def loss(self, model, batch):
        self.losses += 1
        if self.after is not None:
            self.after(self.losses)
        logits = model(batch["x"])
        loss = F.cross_entropy(logits.float(), batch["label"])
        terms = {"hard": loss.detach()}
        if self.poison & set(batch["index"].tolist()):
            loss = loss * float("nan")
            terms["soft"] = loss.detach()
        return loss, {
            "correct": (logits.argmax(1) == batch["label"]).sum(),
            "count": len(batch["label"]),
            "terms": terms,
        }

    def evaluate(self, model):
        mine = range(rank(), len(self.validation), world_size())
        rows = []
        for i in mine:
            item = collate([self.validation[i]])
            logits = model(item["x"]).float()
            rows.append((i, F.cross_entropy(logits, item["label"]).item(), int(logits.argmax()) == int(item["label"])))
        rows = sorted(row for part in gather_objects(rows) for row in part)
        assert [row[0] for row in rows] == list(range(len(self.validation))), "each validation item exactly once"
        return {"loss": sum(r[1] for r in rows) / len(rows), "accuracy": sum(r[2] for r in rows) / len(rows)}

    def describe(self, batch):
        return " ".join(f"item-{i}.jpg" for i in batch["index"].tolist())
