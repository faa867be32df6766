"""A GPU of shapes alone: inside `gpu()`, tensors on "cuda" have a size, a dtype and a device but no numbers.

A CPU tensor that meets a CUDA one, a gradient of another dtype than its parameter and a wait for the device show
there on any machine; wrong numbers do not. The C++ autograd engine asks for a driver, so `backward` walks the same
graph in Python and checks every gradient against what the forward pass recorded.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# an autocast that leaves these in half precision would round the loss: eight bits for a probability
LOSSES = ("_log_softmax", "_softmax", "nll_loss_forward", "binary_cross_entropy_with_logits", "exp", "log")


class Watch(TorchDispatchMode):
    """Sees every operation: writes down the copies and reads for which the host waits, and losses in half precision."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.half_losses: list[str] = []
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        if name == "_local_scalar_dense":  # item(), int(), bool()
            self.waits += ["item"] * (inputs[0].device == CUDA)
            return {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0}.get(inputs[0].dtype, 1)
        out = func(*args, **(kwargs or {}))
        if name in LOSSES and inputs[0].dtype in (torch.float16, torch.bfloat16) and inputs[0].device == CUDA:
            self.half_losses.append(name)
        if name in ("_to_copy", "copy_"):
            self.copy(name, args, kwargs or {}, inputs[-1], out)
        self.operations[name] += 1
        return out

    def copy(self, name: str, args: tuple, kwargs: dict, source: Tensor, out: Tensor) -> None:
        """Between host and device a copy waits unless it is asked not to and the host's side is pinned."""
        if {source.device.type, out.device.type} != {"cpu", "cuda"}:
            return
        asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not (asked and getattr(source, "pinned", False)):
            self.waits.append(f"{name} {tuple(source.shape)} {source.device.type} -> {out.device.type}")


def possible() -> bool:
    """Whether this torch lets shapes alone be on a GPU: torch 2.6 asks for the driver at the first copy."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.ones(2).to(CUDA)[:, None].mul(2)
    except RuntimeError as error:
        if "driver" not in str(error):
            raise
        return False
    return True


@contextmanager
def gpu() -> Iterator[Watch]:
    """A fake CUDA device with bf16; yields what sees the operations on it."""

    def tolist(tensor):
        watch.waits += ["tolist"] * (tensor.device == CUDA)
        if tensor.is_floating_point():
            return np.zeros(tensor.shape).tolist()
        return np.arange(tensor.numel()).reshape(tensor.shape).tolist()  # also a permutation

    def numpy(tensor):
        assert tensor.device.type == "cpu", "numpy() of a CUDA tensor"
        return np.zeros(tensor.shape, dtype=str(tensor.dtype)[6:])

    def pin_memory(tensor):
        tensor.pinned = True
        return tensor

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # else autocast switches itself off
            (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
            (torch.cuda, "current_stream", lambda *args: SimpleNamespace(wait_stream=lambda stream: None)),
            (torch.cuda, "Stream", lambda *args: SimpleNamespace()),
            (torch.cuda, "stream", lambda stream: ExitStack()),
            (nn.Module, "to", move),
            (Tensor, "backward", backward),
            (Tensor, "pin_memory", pin_memory),
            (Tensor, "record_stream", lambda tensor, stream: None),
            (FakeTensor, "tolist", tolist),
            (FakeTensor, "numpy", numpy),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        # asked for an LSTM, cuDNN looks for the driver before anything else
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        watch = stack.enter_context(Watch())
        yield watch


def move(model: nn.Module, *args, **kwargs) -> nn.Module:
    """model.to(device): Module.to would swap real parameters for fake ones only where nobody points at them."""
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and device is not None and tensor.device != device:
                    moved = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
                    store[name] = memo.setdefault(id(tensor), moved)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return model


def backward(loss: Tensor) -> None:
    """loss.backward() in Python. AssertionError for a gradient that arrives in another dtype or on another device."""
    waiting = uses(loss.grad_fn)
    grads: dict = defaultdict(dict)  # node -> {output number: gradient}
    grads[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (after, slot), grad in zip(edges(node), outputs(node, grads.pop(node, {})), strict=True):
                if grad is not None:
                    old = grads[after].get(slot)
                    grad = as_recorded(grad, after, slot)
                    grads[after][slot] = grad if old is None else old + grad
                waiting[after] -= 1
                if not waiting[after]:
                    ready.append(after)


def uses(root) -> Counter:
    """How many edges lead to each node below `root`."""
    count: Counter = Counter()
    seen, stack = {root}, [root]
    while stack:
        for after, _ in edges(stack.pop()):
            count[after] += 1
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return count


def edges(node) -> list[tuple]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def outputs(node, given: dict) -> list[Tensor | None]:
    """What a node passes on, one entry for each of its edges; a leaf keeps its gradient."""
    if hasattr(node, "variable"):
        if given:
            leaf, grad = node.variable, given[0]
            assert (grad.dtype, grad.device) == (leaf.dtype, leaf.device), f"{leaf.dtype} leaf gets {grad.dtype}"
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
        return []
    if not given:
        return [None] * len(edges(node))
    metadata = getattr(node, "_input_metadata", ())
    inputs = [given.get(k) for k in range(max(len(metadata), 1))]
    if isinstance(node, BackwardCFunction):  # a Function of this project: it has no edge for what is no tensor
        found = node.apply(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        return [grad for grad, needed in zip(found, node.needs_input_grad, strict=True) if needed]
    found = node(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    return [grad for grad, edge in zip(found, node.next_functions, strict=True) if edge[0] is not None]


def as_recorded(grad: Tensor, node, slot: int) -> Tensor:
    """What the engine does before it hands a gradient on: the shape and dtype that the forward pass recorded."""
    metadata = getattr(node, "_input_metadata", ())
    if slot >= len(metadata):
        return grad
    seen = metadata[slot]
    assert grad.device == seen.device, f"{node.name()}: gradient on {grad.device}, recorded {seen.device}"
    if tuple(grad.shape) != tuple(seen.shape):
        grad = grad.sum_to_size(tuple(seen.shape))
    return grad.to(seen.dtype)
