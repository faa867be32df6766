"""Make models by name, load the checkpoints that people have, and write them back.

    model = load_pretrained("vit-tiny-patch16-224", "deit_tiny.safetensors", num_classes=10)
    save_pretrained(model, "out", layout="transformers")

The model of a family (vit.py, bert.py) knows nothing of files; it gets its key table, preprocessing
and labels here. What the files look like its module in files/ says (files/vit.py), and where that
says nothing files/defaults.py:
  build(config)                 the model; config is a frozen dataclass with `name`, `num_classes`,
                                `family`; for a two-tower model build(config, vision, text)
  names, config_for(name)       the names that it knows; the configuration of one of them or of the
                                same pattern, else None
  layouts                       {layout of weight files: prefixes that the names may carry}
  adapter_layouts               layouts in which the other library can load an adapter
  key_table(config, layout)     rows of names.Entry; only where there are layouts
  fit_config(config, shapes)    the configuration with what a file's names and shapes (ours) tell
  adapt(state, old, new)        interpolation of positions between picture sizes, in place
  config_from_json(data)        a configuration from another library's config.json; else None
  config_to_json(config, layout)   the other way; labels and preprocessing are added here
  preprocess                    mean, std, interpolation, resize where the checkpoint says nothing
  layout_settings               {layout: fields of the configuration} of a file without config.json
  lone_file(config, keys, file_name, layout)   such fields that keys and name tell, and notes on
                                what they leave open
  notes(config, layout)         what the library of that layout does otherwise
  ignored, optional             patterns: keys of a file that mean nothing; names of ours that a
                                file may lack or have in addition
"""

import difflib
import functools
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from reference_models.errors import ModelError
from reference_models.files.checkpoint import FAMILIES, Checkpoint, described, family_module, find_checkpoint
from reference_models.files.config_check import readable
from reference_models.files.names import file_layout, prefixed, rename, strip_wrappers, to_ours, to_theirs
from reference_models.files.pooling import with_pooling
from reference_models.files.preprocess import assumed_settings, assumption, preprocess_for
from reference_models.files.refused import instead
from reference_models.files.safetensors import read_weights, write_model_files

WEIGHTS = Path(__file__).parent / "weights"  # the bundled nano models


def list_models() -> list[str]:
    """Every name that `create_model` is sure to know; other sizes of the same pattern work too."""
    return [name for family in FAMILIES for name in family_module(family).names]


def config_for(name: str):
    """The configuration of a model name; ModelError with the nearest names where there is none."""
    for family in FAMILIES:
        if (config := family_module(family).config_for(name)) is not None:
            return config
    if why := instead(name):
        raise ModelError(f"{name}: {why}")
    words, known = name.replace("_", "-").lower().split("-"), list_models()
    near = [one for one in known if {*words} <= {*one.split("-")}] or difflib.get_close_matches("-".join(words), known)
    hint = f"did you mean {' or '.join(near[:3])}? " if near else ""
    hint = "no such folder, and a name has no slash (weights of the hub are hf:org/name); " if "/" in name else hint
    raise ModelError(f"unknown model {name!r}; {hint}list_models(), train.py --list-models name them all")


def config_of(name_or_dir: str | Path):
    """The configuration of a model name or of a checkpoint's directory; ModelError for neither."""
    folder = Path(name_or_dir).is_dir()
    return described(find_checkpoint(name_or_dir), None)[0] if folder else config_for(str(name_or_dir))


def create_model(name: str, num_classes: int | None = None, pictures: dict | None = None, **overrides) -> nn.Module:
    """A model with random weights, for torch's present seed.

    num_classes: outputs of the head, None for the name's own number. pictures: as in
    `load_pretrained`. `overrides` replace fields of its configuration, such as image_size (pixels)
    or depth (blocks). Raises ModelError for an unknown name or field.
    """
    config = _for_classes(config_for(name), num_classes)
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    known = [field.name for field in fields(config)]
    if unknown := [key for key in overrides if key not in known]:
        raise ModelError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    config = replace(config, **overrides)
    return _build(config, _preprocess(config), {}, pictures or {})


def bundled_weights(name: str) -> Path | None:
    """The folder of the weights that come with the project, None where the model has none."""
    return WEIGHTS / name if (WEIGHTS / name / "config.json").exists() else None


def load_pretrained(
    name_or_dir: str | Path,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    pictures: dict | None = None,
    texts: bool = False,
    **overrides,
) -> nn.Module:
    """A model with the weights of a checkpoint.

    name_or_dir: a model name; or a directory with config.json, a file in one or "hf:org/name",
      which then is the checkpoint too
    weights: a safetensors file (or its .index.json, or pytorch_model.bin), which belongs to the
      checkpoint in its folder; a directory; "hf:org/name"; None for those that come with the
      project, "none" for random ones
    num_classes: None keeps the checkpoint's head; another number replaces it
    image_size: side in pixels; position tables are interpolated to it. None keeps that of the
      name or the checkpoint
    pictures: what is known better than the files know it: mean and std (three numbers each, for
      pixels in 0..1), interpolation, resize ("squash" or "crop"), crop_pct
    texts: of timm's picture tower and open_clip's whole CLIP in one folder the latter is meant, as
      where a CLIP's name is given

    Every key must find its place and every tensor its weights, with the right shape and finite
    values; otherwise ModelError names the file and the keys. Nothing is printed: what was assumed
    stands in `model.notes`, a line each.
    """
    by_name = not (Path(name_or_dir).exists() or str(name_or_dir).startswith("hf:"))
    wanted = config_for(str(name_or_dir)) if by_name else None
    weights = weights or (bundled_weights(name_or_dir) if by_name else name_or_dir)
    if weights is None:
        raise ModelError(
            f"{name_or_dir} does not come with weights: give a safetensors file, a folder or hf:org/name; "
            'weights="none" or create_model make it with random ones'
        )
    if by_name and weights == "none":
        sizes = {"image_size": image_size} if image_size else {}
        return create_model(name_or_dir, num_classes, pictures, **sizes, **overrides)
    texts = texts or getattr(wanted, "family", "") == "clip"
    checkpoint = find_checkpoint(name_or_dir if weights == "none" else weights, texts)
    with readable(checkpoint.settings):
        config, notes = described(checkpoint, wanted)
    config = _for_classes(config, num_classes)
    config = with_pooling(config, checkpoint.folder, overrides.get("pooling"))
    if weights == "none":
        config = _final(config, None, num_classes, image_size, overrides)
        return _build(config, _preprocess(config), checkpoint.pictures, pictures or {})
    family = family_module(config.family)
    state, files = read_weights(checkpoint.path)
    file_name = Path(files).name
    with readable(files):
        tensors, layout = _translate(strip_wrappers(state), config, family, files)
        if not checkpoint.data:
            config = replace(config, **family.layout_settings.get(layout, {}))
            told, open_points = family.lone_file(config, state.keys(), file_name, layout)
            config, notes = replace(config, **told), notes + open_points
        found = family.fit_config(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        config = _final(found, wanted, num_classes, image_size, overrides)
        before = {key: tensor.shape for key, tensor in tensors.items()}
        family.adapt(tensors, found, config)
        if any(tensors[key].shape != shape for key, shape in before.items()):
            here, there = (getattr(getattr(one, "vision", one), "image_size", None) for one in (found, config))
            notes = [*notes, f"{file_name}: positions for {here} pixels are interpolated to {there}"]
    tensors = _fitting(config, tensors, found, family, files, layout)
    assumed = assumed_settings(_preprocess(config), layout, file_name, getattr(config, "distilled", False))
    with readable(checkpoint.settings):
        model = _build(config, assumed, checkpoint.pictures, pictures or {})
    model.source = checkpoint.path
    model.notes = [*notes, *_other_sizes(wanted, found), *_head_notes(model, checkpoint, found, num_classes)]
    model.notes += family.notes(config, layout)
    if model.preprocess:
        said = checkpoint.pictures.keys() | (pictures or {}).keys()
        model.notes += [*checkpoint.notes, *assumption(model.preprocess, said, file_name)]
    model.load_state_dict(tensors, strict=False)  # `_fitting` was strict
    return model


def _other_sizes(wanted, found) -> list[str]:
    """What to say where a checkpoint's own settings give other sizes than the name beside it."""
    if wanted is None or type(wanted) is not type(found):
        return []
    sizes = ("dim", "depth", "heads", "hidden", "patch_size")
    pairs = [(key, getattr(found, key, None), getattr(wanted, key, None)) for key in sizes]
    other = [f"{key} {own} (not {named})" for key, own, named in pairs if own != named]
    return [f"{wanted.name}: the checkpoint's own sizes are taken: {', '.join(other)}"] if other else []


def _head_notes(model: nn.Module, checkpoint: Checkpoint, found, num_classes: int | None) -> list[str]:
    """The labels of a head that is kept; what there is to say of one that is not, or has none."""
    given, classes = _classes(found), _classes(model.config)
    if not given or not classes:
        return []
    if given != classes:
        return [f"head: the checkpoint has {given} classes; a new one for {classes} replaces it"]
    model.labels = checkpoint.labels(classes)
    if num_classes is None or model.labels:
        return []
    return [f"head: the checkpoint's own is kept; its files do not name its {classes} classes"]


def save_pretrained(model: nn.Module, directory: str | Path, layout: str = "minilora") -> Path:
    """Write config.json, model.safetensors and preprocessor_config.json, for us ("minilora") or
    another library.

    layout: "minilora", or one of the model's: "transformers", "timm", "torchvision",
    "open_clip". Raises ModelError for a layout that the model does not have, and for a model
    that still has LoRA layers.
    """
    config, family = model.config, family_module(model.config.family)
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    if any(".lora_" in key for key in state):
        raise ModelError("save_pretrained: this model still has LoRA layers; call merge_lora(model) first")
    layout = file_layout(config, family.layouts, layout)
    if layout == "minilora":
        data = {"minilora": asdict(config)}
    else:
        state = to_theirs(state, family.key_table(config, layout))
        data = family.config_to_json(config, layout)
    return write_model_files(directory, state, data, layout, model)


def _for_classes(config, num_classes: int | None):
    """A CLIP, which has no classes, is its picture tower where some are asked for."""
    if num_classes is None or config.family not in ("clip", "dual"):
        return config
    return family_module("vit_variants").tower_of(config) if config.family == "clip" else config.vision


def _build(config, assumed: dict, said: dict, chosen: dict) -> nn.Module:
    """The model, and what files say of it: key table, preprocessing; labels and notes for later."""
    model, family = _make(config), family_module(config.family)
    if family.layouts:
        model.layouts, model.key_table = family.adapter_layouts, functools.partial(family.key_table, config)
    model.preprocess = preprocess_for(getattr(config, "image_size", None), assumed, said, chosen)
    if hasattr(model, "vision"):
        model.vision.preprocess = model.preprocess
    model.labels, model.notes = None, []
    return model


def _preprocess(config) -> dict:
    """What the family says of pictures; a two-tower model asks its picture tower's family."""
    config = getattr(config, "vision", config)
    family = family_module(config.family)
    return family.preprocess_of(config) if hasattr(family, "preprocess_of") else family.preprocess


def _make(config) -> nn.Module:
    made = {tower: _make(getattr(config, tower)) for tower in ("vision", "text") if hasattr(config, tower)}
    # of CLIP the one that is meant
    towers = [getattr(model, tower, model) for tower, model in made.items()]
    try:
        return family_module(config.family).build(config, *towers)
    except ValueError as error:  # sizes that do not go together
        raise ModelError(f"{config.name}: {error}") from None


def _translate(state: dict[str, Tensor], config, family, files: str):
    """Our names for the tensors of a file: the layout whose table knows most of the keys."""
    state = {key: tensor for key, tensor in state.items() if not re.search(family.ignored, key)}
    best: tuple = (0, "", {}, [])
    for layout, prefixes in {"minilora": family.own_prefixes, **family.layouts}.items():
        own = layout == "minilora"
        table = [rename(key, key) for key in _build_shapes(config)] if own else family.key_table(config, layout)
        for names in prefixed(state, prefixes):
            renamed = {key: state[theirs] for key, theirs in names.items()}
            tensors, unknown = to_ours(renamed, table)
            if len(renamed) - len(unknown) > best[0]:
                best = (len(renamed) - len(unknown), layout, tensors, [names[key] for key in unknown])
    known, layout, tensors, unknown = best
    if not known:
        raise ModelError(
            f"{files}: no key belongs to a {config.family} model; it begins with {', '.join(list(state)[:3])}"
        )
    if unknown := [key for key in unknown if not re.search(family.ignored, key)]:
        raise ModelError(
            f"{files}: {known} of {len(state)} keys are those of the family {config.family}; {len(unknown)} keys have "
            f"no place in {config.name}: {', '.join(unknown[:5])}"
        )
    return tensors, layout


def _build_shapes(config) -> dict[str, tuple]:
    with torch.device("meta"):
        whole = {"pooler": True, "pooling": "pooler"}  # also what the pooling leaves out
        model = _make(replace(config, **{key: value for key, value in whole.items() if hasattr(config, key)}))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _final(found, wanted, num_classes, image_size, overrides):
    changes = dict(overrides)
    if wanted is not None:
        changes.setdefault("name", wanted.name)
        # what the name says; position tables are interpolated to it
        for key in ("image_size", "window"):
            if key in {field.name for field in fields(wanted)}:
                changes.setdefault(key, getattr(wanted, key))
    if image_size is not None:
        changes["image_size"] = image_size
    if num_classes is not None:
        changes["num_classes"] = num_classes
    if unknown := changes.keys() - {field.name for field in fields(found)}:
        raise ModelError(f"{found.name} has no setting {', '.join(sorted(unknown))}")
    return replace(found, **changes)


def _classes(config) -> int | None:
    return getattr(config, "num_classes", None)  # None: a family without classifier


def _fitting(config, tensors: dict[str, Tensor], found, family, files: str, layout: str) -> dict[str, Tensor]:
    """The tensors for the model of `config`, strictly: shapes, missing keys and extra keys in one
    message, by our names and by those of the file.

    Asked of a model without storage: a config.json of somebody else's may describe
    one that no memory holds.
    """
    with torch.device("meta"):
        model = _make(config)
    own = model.state_dict()
    heads = tuple(f"{name}." for name in model.head_modules)
    new_head = _classes(config) and _classes(config) != _classes(found)
    if new_head or _classes(config) == 0:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    extra = [key for key in tensors if key not in own and not re.search(family.optional, key)]
    missing = [key for key in own if key not in tensors and not (new_head and key.startswith(heads))]
    table = [] if layout == "minilora" else family.key_table(found, layout)
    theirs = {ours: f" ({entry.theirs})" for entry in table for ours in entry.ours if ours != entry.theirs}
    shapes = {key: (tuple(tensors[key].shape), tuple(own[key].shape)) for key in own if key in tensors}
    wrong = [
        f"{key} is {file} in the file{theirs.get(key, '')}, {model} in the model"
        for key, (file, model) in shapes.items()
        if file != model
    ]
    missing = [key + theirs.get(key, "") for key in missing]
    problems = {"missing": missing, "no place for": extra, "wrong shape": wrong}
    if any(problems.values()):
        lines = [f"{what} {len(keys)}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys]
        raise ModelError(f"{files} does not fit {config.name}{_looks_like(tensors, family)}: {'; '.join(lines)}")
    return tensors


def _looks_like(tensors: dict[str, Tensor], family) -> str:
    """Which name of the family has just these blocks, if one has."""
    there = {(key, tuple(tensor.shape)) for key, tensor in tensors.items() if re.search(r"\.\d+\.", key)}
    for name in family.names if there else ():
        shapes = _build_shapes(family.config_for(name))
        if there == {(key, shape) for key, shape in shapes.items() if re.search(r"\.\d+\.", key)}:
            return f" (it looks like --model {name})"
    return ""
