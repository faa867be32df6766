"""The models of the benchmarks, ours and peft's on transformers, with identical weights, inputs and
optimizers.

A `Case` makes training steps: `ours(mode, ...)`, `peft(...)` and `floor()`, each a function without arguments
that runs one forward, backward and optimizer step (the floor: the plain frozen model with a gradient to its
input only).
"""

import argparse
import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from minilora.inject import cast_frozen, inject_lora
from minilora.lora_config import LoRAConfig
from minilora.speed.gemm import speed_up
from reference_models import create_model, save_pretrained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPECS = {  # name: (our model, batch on a CPU, batch on a GPU)
    "vit-tiny": ("vit-tiny-patch16-224", 32, 256),
    "vit-base": ("vit-base-patch16-224", 8, 128),
    "bert-base": ("bert-base", 8, 128),
    "clip-vit-b-32": ("clip-vit-b-32", 8, 64),
}
CLASSES, TOKENS, CHOICES = 10, 64, 4
# what is adapted: our names, and those of transformers 5
TARGETS = {"qv": ("q_proj", "v_proj"), "six": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}
PEERS = {
    "vit": {"qv": ["q_proj", "v_proj"], "six": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]},
    "bert": {"qv": ["query", "value"], "six": r".*layer\.\d+\..*(query|key|value|dense)"},
    "clip": {"qv": ["q_proj", "v_proj"], "six": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
}


class Case:
    """One model with its batch; weights are random and the same for everybody."""

    def __init__(
        self,
        name: str,
        device: str,
        batch: int | None = None,
        depth: int | None = None,
        targets: str = "qv",
        r: int = 8,
        norms: bool = False,
    ):
        """targets: a key of TARGETS; r: the rank of all adapters; norms: those are trained too."""
        self.name, self.device = name, device
        self.targets, self.r, self.norms = targets, r, norms
        our_name, cpu_batch, gpu_batch = SPECS[name]
        self.batch = batch or (gpu_batch if device.startswith("cuda") else cpu_batch)
        torch.manual_seed(0)
        self.kind = our_name.split("-")[0]
        sizes = {"depth": depth} if depth else {}
        if self.kind == "vit":
            self.plain = create_model(our_name, num_classes=CLASSES, **sizes)
        elif self.kind == "bert":
            self.plain = Classifier(create_model(our_name, pooler=True, **sizes))
        else:
            self.plain = create_model(our_name)
        self.make_batch()

    def make_batch(self) -> None:
        generator = torch.Generator().manual_seed(1)
        B, device = self.batch, self.device
        self.images = torch.randn(B, 3, 224, 224, generator=generator).to(device)
        self.labels = torch.randint(CLASSES, (B,), generator=generator).to(device)
        rows = B * CHOICES if self.kind == "clip" else B
        length = 24 if self.kind == "clip" else TOKENS
        self.ids = torch.randint(1000, 20000, (rows, length), generator=generator).to(device)
        if self.kind == "clip":
            self.ids[:, 0], self.ids[:, -1] = 49406, 49407
            self.labels = self.labels % CHOICES
        self.mask = torch.ones_like(self.ids)

    # ---- what each side computes
    # ------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, images: torch.Tensor | None = None) -> torch.Tensor:
        """Cross entropy of one batch, for our model or for a peft-wrapped transformers model."""
        images = self.images if images is None else images
        if self.kind == "vit":
            logits = model(images)
            logits = getattr(logits, "logits", logits)
        elif self.kind == "bert":
            logits = model(self.ids, self.mask)
        else:
            logits = self.choice_logits(model, images)
        return F.cross_entropy(logits.float(), self.labels)

    def choice_logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if hasattr(model, "encode_image"):
            picture, text = model.encode_image(images), model.encode_text(self.ids, self.mask)
            scale = model.logit_scale.exp()
        else:
            core = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's, or plain
            output = core(input_ids=self.ids, attention_mask=self.mask, pixel_values=images)
            picture, text, scale = output.image_embeds, output.text_embeds, core.logit_scale.exp()
        picture = F.normalize(picture, dim=-1)[:, None]
        return scale * (picture * F.normalize(text, dim=-1).unflatten(0, (-1, CHOICES))).sum(-1)

    def modules_to_save(self) -> tuple[str, ...]:
        return () if self.kind == "clip" else ("head",)

    # ---- the candidates
    # ---------------------------------------------------------------------------------------------

    def ours(
        self,
        mode: str,
        dropout: float = 0.0,
        amp: str = "fp32",
        base: str = "fp32",
        pooled: bool = True,
        fast: bool = True,
    ) -> Callable:
        model = copy.deepcopy(self.plain).to(self.device).train()
        set_pooled(model, pooled)
        if mode == "full":
            model.requires_grad_(True)
        else:
            lora = mode == "lora"
            heads = self.modules_to_save() or (() if lora else model.head_modules)
            method = {"target_modules": TARGETS[self.targets], "train_norms": self.norms} if lora else {}
            options = {"r": self.r, "lora_alpha": 16, "lora_dropout": dropout, "target_modules": (), **method}
            inject_lora(model, LoRAConfig(**options, modules_to_save=heads))
            cast_frozen(model, DTYPES[base])
        return self.step(speed_up(model) if fast else model, amp)

    def peft(self, dropout: float = 0.0, amp: str = "fp32", mode: str = "lora") -> Callable:
        model = self.transformers_model().to(self.device).train()
        if mode == "lora":
            from peft import LoraConfig, get_peft_model

            names = PEERS[self.kind][self.targets]
            saved = {"vit": ["classifier"], "bert": ["head"], "clip": None}[self.kind]
            options = {"r": self.r, "lora_alpha": 16, "lora_dropout": dropout, "target_modules": names}
            model = get_peft_model(model, LoraConfig(**options, modules_to_save=saved))
            for name, parameter in model.named_parameters():
                if self.norms and "norm" in name.lower():
                    parameter.requires_grad_(True)
        return self.step(model, amp)

    def transformers_model(self) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kinds = {"vit": "ViTForImageClassification", "bert": "BertModel", "clip": "CLIPModel"}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_pretrained(self.plain.encoder if self.kind == "bert" else self.plain, folder, layout="transformers")
            dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if self.kind == "bert" else {}
            loaded = getattr(transformers, kinds[self.kind]).from_pretrained(
                folder, attn_implementation="sdpa", **dropouts
            )
        loaded = loaded.float()
        if self.kind == "bert":
            wrapped = PeerClassifier(loaded)
            wrapped.head.load_state_dict(self.plain.head.state_dict())
            return wrapped
        return loaded

    def floor(self, amp: str = "fp32") -> Callable:
        """Forward and the gradient to the input of the plain frozen model, all tokens to the end."""
        model = copy.deepcopy(self.plain).to(self.device).train().requires_grad_(False)
        set_pooled(model, False)
        images = self.images.clone().requires_grad_(True)
        for module in model.modules():  # text has no differentiable input: its first hidden state stands in for it
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        precision = self.autocast(amp)

        def step():
            images.grad = None
            with precision():
                loss = self.loss(model, images)
            loss.backward()

        return step

    def autocast(self, amp: str) -> Callable:
        kind = self.device.split(":")[0]
        if amp == "fp32":
            return contextlib.nullcontext
        return lambda: torch.autocast(kind, dtype=DTYPES[amp])

    def step(self, model: nn.Module, amp: str) -> Callable:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(self.device.split(":")[0], enabled=amp == "fp16")
        precision = self.autocast(amp)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with precision():
                loss = self.loss(model)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        step.model = model
        return step

    # ---- arithmetic
    # -------------------------------------------------------------------------------------------------

    def ceiling(self) -> float:
        """3F / (3F - F_lin): a full step is three forwards' worth of products; LoRA saves those of dW of the
        Linears.
        """
        counted = {"linear": 0, "attention": 0}
        hooks = [
            module.register_forward_hook(
                lambda m, i, o: counted.__setitem__("linear", counted["linear"] + 2 * o.numel() * m.in_features)
            )
            for module in self.plain.modules()
            if isinstance(module, nn.Linear)
        ]
        original = F.scaled_dot_product_attention

        def counting(q, k, v, *args, **kwargs):
            counted["attention"] += 4 * q.numel() * k.shape[-2]
            return original(q, k, v, *args, **kwargs)

        F.scaled_dot_product_attention = counting
        set_pooled(self.plain, False)
        try:
            with torch.no_grad():
                self.loss(self.plain.to(self.device))
        finally:
            F.scaled_dot_product_attention = original
            set_pooled(self.plain, True)
            for hook in hooks:
                hook.remove()
        whole = counted["linear"] + counted["attention"]
        return 3 * whole / (3 * whole - counted["linear"])


class Classifier(nn.Module):
    """Our BERT with a linear head on the pooled token."""

    head_modules = ("head",)

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.num_features, CLASSES)

    def forward(self, ids, mask):
        return self.head(self.encoder.pooled(ids, mask))


class PeerClassifier(nn.Module):
    """transformers' BERT with the same head."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, CLASSES)
        self.config = encoder.config

    def forward(self, ids, mask):
        return self.head(self.encoder(input_ids=ids, attention_mask=mask).pooler_output)


def add_method(flags: argparse.ArgumentParser) -> None:
    """--targets, --r and --norms: what LoRA adapts, ours and peft's."""
    flags.add_argument("--targets", default="qv", choices=list(TARGETS), help="q and v, or all six linear layers")
    flags.add_argument("--r", type=int, default=8, help="rank")
    flags.add_argument("--norms", action="store_true", help="train the normalisation layers too")


def method(arguments: argparse.Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("targets", "r", "norms")}


def set_pooled(model: nn.Module, value: bool) -> None:
    """Switch the pooled-token last block of every tower."""
    for module in model.modules():
        if hasattr(module, "pooled_last_block"):
            module.pooled_last_block = value
