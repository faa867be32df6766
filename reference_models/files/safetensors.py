"""Read and write the files of a checkpoint: safetensors, sharded or not, torch.save's, json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_models.errors import ModelError
from reference_models.files.preprocess import preprocess_to_json
from reference_models.text.textfiles import read_json, replace_file, write_atomic

FORMATS = "another format; read are safetensors and torch.save's .bin, .pt, .pth, .ckpt"
READ = "Read are safetensors files and what torch.save made of a dictionary of tensors (.bin, .pt, .pth, .ckpt)"
# the first that exists is meant; an index brings its shards, pickles only without safetensors
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a checkpoint, floating ones as float32 and checked to be finite; and the
    file's name for messages."""
    path = Path(path)
    file = path if path.is_file() else next(iter(weight_files(path)), None)
    if file is None:
        raise ModelError(f"{path}: no weights here; expected model.safetensors, its index.json or pytorch_model.bin")
    state: dict[str, Tensor] = {}
    for one in _shards(file) if file.name.endswith(".index.json") else [file]:
        read = _read_bin(one) if _is_pickle(one) else read_safetensors(one)
        for key, tensor in read.items():
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise ModelError(f"{one}: {key} holds NaN or infinite values; the file is damaged")
                tensor = tensor.float()
            state[key] = tensor
    return state, str(file)


def weight_files(folder: Path, open_clip: bool = False) -> list[Path]:
    """The weight files of a folder; the first is the one that is meant, on request open_clip's."""
    names = sorted(NAMES, key=lambda name: open_clip and not name.startswith("open_clip"))
    found = [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]
    return [file for file in found if file.is_file()]  # a pipe would be waited for


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: no weight_map of tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not a plain file name beside the index")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: the shard {name} is missing beside it")
    return [index.parent / name for name in names]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    return read_header(path, lambda file: {key: file.get_tensor(key) for key in file.keys()})


def read_header(path: Path, read: Callable = lambda file: None) -> Any:
    """read(the open file); ModelError where its header does not fit its length."""
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file (truncated, or {FORMATS}?): {error}") from None


def _is_pickle(path: Path) -> bool:
    """Whether torch.save made a file, whatever its name: a zip archive, or before 2020 a pickle."""
    with open(path, "rb") as file:
        return path.suffix in (".bin", ".pt", ".pth") or file.read(4)[:2] in (b"PK", b"\x80\x02")


def _read_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict; weights_only=True refuses every pickle that holds more than tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: refused, it holds more than tensors or is damaged: {reason}; {READ}") from None
    whole, kind = state if isinstance(state, dict) else {}, type(state).__name__
    state = whole.get("state_dict", whole.get("model", whole))
    if isinstance(state, dict) and state and all(isinstance(tensor, Tensor) for tensor in state.values()):
        return state
    kinds = ", ".join(f"{str(key)[:40]} ({type(value).__name__})" for key, value in [*whole.items()][:12])
    raise ModelError(
        f"{path}: no dictionary of tensors in it, but {kinds or kind}; save the part that is the "
        f"model: torch.save(torch.load(FILE)[KEY], 'model.pt'). {READ}"
    )


def write_model_files(directory, state: dict[str, Tensor], data: dict, layout: str, model: nn.Module) -> Path:
    """Weights, config.json and preprocessor_config.json, each under a temporary name first."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    labels = getattr(model, "labels", None)
    if labels and layout == "minilora":
        data["label_names"] = list(labels)
    elif layout == "timm":
        data |= {"num_classes": model.config.num_classes} | ({"label_names": list(labels)} if labels else {})
    elif classes := getattr(model.config, "num_classes", 0):
        names = labels or [f"LABEL_{i}" for i in range(classes)]
        data |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        if getattr(model, "multi_label", False):  # several for each picture: a sigmoid, no softmax
            data["problem_type"] = "multi_label_classification"
    documents = preprocess_to_json(model.preprocess, layout, data)
    name = "open_clip_model.safetensors" if layout == "open_clip" else "model.safetensors"
    write_safetensors(directory / name, {key: tensor.cpu().clone() for key, tensor in state.items()})
    for name, document in documents.items():
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_atomic(directory / name, text.encode())
    return directory


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors that share no memory; format: https://github.com/huggingface/safetensors."""
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
