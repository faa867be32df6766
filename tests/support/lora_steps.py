"""Small LoRA trainings of a ViT, a BERT and a CLIP, for the tests that compare two ways of computing the same."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import LoRAConfig, inject_lora
from minilora.tasks.choice.task import ChoicePredictor
from reference_models import create_model

TEXT = {"dim": 24, "heads": 3, "hidden": 48, "depth": 2, "vocab_size": 60, "max_positions": 20}
CLIP = {"image_size": 32, "patch_size": 16, "vision_dim": 24, "vision_heads": 3, "vision_hidden": 48}
CLIP |= {"vision_depth": 2, "text_dim": 24, "text_heads": 3, "text_hidden": 48, "text_depth": 2}
CLIP |= {"vocab_size": 60, "context": 12, "embed_dim": 16, "eos_token_id": 59}
ROWS, CLASSES = 8, 4


class BertClassifier(nn.Module):
    """BERT's pooled token and a linear head."""

    def __init__(self):
        super().__init__()
        self.text = create_model("bert-base", pooler=True, **TEXT)
        self.head = nn.Linear(TEXT["dim"], CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.text.pooled(ids, mask))


class Step:
    """A model with LoRA on q and v (random B), one batch, and its loss; always the same for a name."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.name, self.labels = name, torch.arange(ROWS) % CLASSES
        self.images = torch.randn(ROWS, 3, 32, 32)
        heads = ("head",)
        if name == "vit":
            sizes = {"image_size": 32, "dim": 24, "heads": 3, "hidden": 48, "depth": 2}
            self.model = create_model("vit-tiny-patch16-224", CLASSES, **sizes)
        elif name == "bert":
            self.model = BertClassifier()
            self.ids = torch.randint(1, 60, (ROWS, 10))
            self.mask = (torch.arange(10) < torch.arange(3, 3 + ROWS)[:, None]).long()
        else:
            self.model, heads = create_model("clip-vit-b-32", **CLIP), ()
            ids = torch.randint(1, 50, (ROWS, CLASSES, 10))
            ids[:, :, :5], ids[:, :, 9] = ids[:, :1, :5], 59  # the choices of a question begin alike
            texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            self.batch = {"image": self.images, "picture": torch.arange(ROWS), "share": False, **texts}
        inject_lora(self.model, LoRAConfig(r=4, modules_to_save=heads, init_lora_weights=False))

    def loss(self) -> Tensor:
        if self.name == "vit":
            logits = self.model(self.images)
        elif self.name == "bert":
            logits = self.model(self.ids, self.mask)
        else:
            logits = ChoicePredictor().logits(self.model, self.batch)
        return F.cross_entropy(logits, self.labels)

    def towers(self) -> list[nn.Module]:
        """What --compile compiles: the model, or a CLIP's two towers."""
        return [self.model.vision, self.model.text] if self.name == "clip" else [self.model]

    def set(self, attribute: str, value: bool) -> None:
        """Set a switch in every module that has it; there must be one."""
        parts = [module for module in self.model.modules() if hasattr(module, attribute)]
        assert parts
        for part in parts:
            setattr(part, attribute, value)


def train(name: str, switch: Callable[[Step], object] = lambda step: None, steps: int = 20) -> Tensor:
    """The losses (steps,) of a LoRA training in float32 without dropout, its switches set by `switch(step)`."""
    step = Step(name)
    switch(step)
    optimizer = torch.optim.AdamW([p for p in step.model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def gradients(step: Step) -> dict[str, Tensor]:
    """{"loss": ..., parameter name: its gradient} of one backward pass."""
    step.model.zero_grad()
    loss = step.loss()
    loss.backward()
    found = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | found
