"""All that changes while training, and its way into named tensors and JSON values and back.

No random-number state is among it: the trainer seeds each optimizer step with step_seed(seed, step,
rank), and data order and augmentation depend on (seed, epoch, item) alone.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from minilora.errors import RunError, UserError
from minilora.training.optim import Plateau

# the clocks and counts that every row of the history has
SHOWN = ("epoch", "step", "seconds", "images_per_second", "peak_memory_mb")


@dataclass
class TrainState:
    """Where a run is: the part that JSON can hold."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # epochs finished
    position: int = 0  # items of the present epoch that are used up
    lr: float = 0.0  # of the last step
    seconds: float = 0.0  # that the present epoch has taken
    # of the present epoch: loss, correct, counted, items
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    overflows: int = 0  # steps that fp16 gradients did not fit in
    skipped: int = 0  # steps refused for NaN or infinity
    history: list[dict] = field(default_factory=list)  # a row per epoch, as in metrics.jsonl
    best: dict | None = None  # the best of them
    plateau: Plateau = field(default_factory=Plateau)

    def count(self, loss: float, correct: float, counted: float, items: int, overflow: bool) -> None:
        """Adds an optimizer step with mean loss `loss` to the sums of the epoch."""
        step = (loss * items, correct, counted, items)
        self.sums = [old + new for old, new in zip(self.sums, step, strict=True)]
        self.overflows += overflow

    @classmethod
    def from_json(cls, values: dict) -> "TrainState":
        """The state that asdict() made `values` of; else ValueError, KeyError or TypeError."""
        own = {name: values[name] for name in cls.__dataclass_fields__}
        now = cls(**own | {"plateau": Plateau(**values["plateau"])})
        counts = (now.step, now.epoch, now.position, now.overflows, now.skipped, now.plateau.bad_epochs)
        counts += (now.plateau.patience,)
        numbers = (now.lr, now.seconds, now.plateau.factor, now.plateau.best or 0.0, *now.sums, *counts)
        rows = [*now.history, *([now.best] if now.best is not None else [])]
        if not all(isinstance(n, int) and 0 <= n < 2**53 for n in counts) or len(now.sums) != 4:
            raise ValueError("a count is not a whole number")
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
            raise ValueError("a value is not a number")
        like = all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
        if not like or (rows and not now.history):
            raise ValueError("the epochs have no rows")
        if not all(isinstance(row[name], (int, float)) for row in rows for name in SHOWN):
            raise ValueError("the rows of the epochs lack their clocks")
        return now


def better(row: dict, best: dict | None, metric: str) -> bool:
    """Whether an epoch's row beats the best so far: by a larger `metric`, or a smaller loss. Of
    equals the first stays; a row without the value, or without a loss, never wins."""
    key, sign = ("val_loss", -1) if metric == "loss" else (metric, 1)
    if row.get(key) is None or row.get("val_loss") is None:
        return False
    return best is None or best.get(key) is None or sign * row[key] > sign * best[key]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed per (run, step, process); hashed, as torch's CPU generator reads only 32 bits."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def portable(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trainable parameters and the persistent buffers, not copied."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    return {n: t for n, t in model.state_dict().items() if n not in frozen and n not in shared}


def load_model_tensors(model: nn.Module, saved: dict[str, Tensor], where: str) -> None:
    """Copies `saved` into the model in place; names and shapes must agree exactly."""
    own = model_tensors(model)
    wrong = [f"missing {n}" for n in own if n not in saved] + [f"unexpected {n}" for n in saved if n not in own]
    wrong += [
        f"{n} is {tuple(saved[n].shape)}, the model has {tuple(own[n].shape)}"
        for n in own
        if n in saved and saved[n].shape != own[n].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{where} belongs to another model or configuration: {'; '.join(wrong[:5])}{more}; "
            "use another --output or --resume never"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def refuse_nonfinite(tensors: dict[str, Tensor], what: str) -> None:
    """RunError naming the first tensor with a NaN or an infinity: such a file is worth nothing."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunError(f"{name} holds NaN or infinity; {what} is not written. Try a smaller --lr or --clip-grad 1")


def tensors_sha256(tensors: dict[str, Tensor], names: Iterable[str] | None = None) -> str:
    """One digest of names and bits, sorted by name (or as in `names`): equal for equal runs."""
    digest = hashlib.sha256()
    for name in sorted(tensors) if names is None else names:
        digest.update(name.encode())
        digest.update(portable(tensors[name]).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory as {parameter name.key: tensor}; empty before its first step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Puts optimizer_tensors() back, on the devices of their parameters and in their memory
    order: a fused kernel walks through all of them by one index."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, tensor in saved.items():
        parameter_name, key = name.rsplit(".", 1)
        parameter = parameters[parameter_name]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}")
        like = torch.empty_like(parameter, dtype=tensor.dtype) if tensor.dim() else tensor.to(parameter.device)
        optimizer.state[parameter][key] = like.copy_(tensor)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"prefix.name": tensor}."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one prefix, under their own names again."""
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


def pack(
    state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, best: dict
) -> tuple[dict[str, Tensor], dict]:
    """(tensors, JSON values) for a checkpoint; the tensors are model.*, best.* and optim.*."""
    own = model_tensors(model)
    refuse_nonfinite(own, "the checkpoint")
    tensors = prefixed("model", own) | prefixed("best", best)
    tensors |= prefixed("optim", optimizer_tensors(model, optimizer))
    return tensors, asdict(state) | {"scaler": scaler.state_dict()}


def unpack(
    tensors: dict[str, Tensor],
    values: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    where: str,
) -> tuple[TrainState, dict[str, Tensor]]:
    """Puts pack()'s answer back into model, optimizer and scaler; returns (state, best tensors).
    UserError where the checkpoint is of another model, or holds what no run writes."""
    load_model_tensors(model, without_prefix("model", tensors), where)
    try:
        load_optimizer_tensors(model, optimizer, without_prefix("optim", tensors))
        scaler.load_state_dict(values["scaler"])
        return TrainState.from_json(values), without_prefix("best", tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where} holds what this run cannot have written ({type(error).__name__}: {reason}); use --resume never"
        ) from None


def changed_data(then: object, now: dict[str, dict]) -> str | None:
    """A line where the data are not those of the checkpoint, None where they are, or where an old
    checkpoint does not say."""
    if not isinstance(then, dict) or then == now:
        return None

    def rows(listing: dict, part: str) -> object:
        return listing[part].get("rows") if isinstance(listing.get(part), dict) else 0

    parts = (part for part in {**then, **now} if then.get(part) != now.get(part))
    changes = ", ".join(f"{part} {rows(then, part)} -> {rows(now, part)} rows" for part in parts)
    return f"data: files were added, removed or renamed since then ({changes}); training continues with those of now"
