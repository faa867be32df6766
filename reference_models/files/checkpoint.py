"""What was given, a file, a folder or hf:org/name, as one answer: this is the checkpoint, these are
its settings, and this is what its files do not say.

    checkpoint = find_checkpoint("weights/model.safetensors")
    checkpoint.data, checkpoint.pictures, checkpoint.tokenizer, checkpoint.labels(10)

A file in a folder is that folder's checkpoint, and what lies beside it belongs to it: config.json,
the image processor's settings, the tokenizer. Where timm's files lie beside open_clip's, which have
the text tower too, open_clip_config.json describes those whose name begins with open_clip.
"""

import importlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

from reference_models.errors import ModelError
from reference_models.files import defaults
from reference_models.files.config_check import check_config
from reference_models.files.preprocess import picture_settings
from reference_models.files.refused import instead
from reference_models.files.safetensors import weight_files
from reference_models.text.textfiles import read_json
from reference_models.text.tokenizers import NAMES as TOKENIZER_FILES

FAMILIES = ("vit", "vit_variants", "beit", "swin", "swinv2", "mobilenet", "bert")
FAMILIES += ("bert_variants", "clip", "clip_text", "fusion", "dual", "student")
SETTINGS = ("config.json", "open_clip_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and what they say."""

    path: Path  # the weight file, or the folder
    folder: Path
    settings: Path  # the file of the model's settings, also where there is none
    data: dict  # its content, {} where there is none
    pictures: dict  # what the files say of pictures: preprocess.py
    notes: tuple[str, ...]

    @property
    def tokenizer(self) -> Path | None:
        """The folder, where a tokenizer lies in it."""
        return self.folder if any((self.folder / name).is_file() for name in TOKENIZER_FILES) else None

    def labels(self, classes: int) -> list[str] | None:
        """The names of a head's classes, None where the files name none or another number."""
        labels = self.data.get("id2label") or self.data.get("label_names")
        if isinstance(labels, dict):
            numbered = all(str(key).isdecimal() for key in labels)
            labels = [labels[key] for key in sorted(labels, key=int)] if numbered else None
        return [str(label) for label in labels] if isinstance(labels, list) and len(labels) == classes else None


def find_checkpoint(source: str | Path, texts: bool = False) -> Checkpoint:
    """The checkpoint that `source` names, of timm's and open_clip's files the latter where `texts`
    are to be read; ModelError where there is none, or for files that cannot be read."""
    path = local(source, texts)
    folder = path if path.is_dir() else path.parent
    there = [folder / name for name in SETTINGS if (folder / name).is_file()]
    if len(there) == 2:
        timm = "architecture" in read_json(there[0])
        files = weight_files(folder, texts and timm) if path.is_dir() else [path]
        path = files[0] if files and timm else path
        there = there[::-1] if files and files[0].name.startswith("open_clip") else there
    settings = (there or [folder / SETTINGS[0]])[0]
    data = read_json(settings) if there else {}
    pictures, notes = picture_settings(folder, data)
    return Checkpoint(path, folder, settings, data, pictures, tuple(notes))


def local(source: str | Path, texts: bool = False) -> Path:
    """A file or folder on this machine; hf:org/name is fetched from the hub once."""
    if str(source).startswith("hf:"):
        from reference_models.files.hub import resolve

        return resolve(str(source), texts)
    path = Path(source)
    if not path.exists():
        raise ModelError(f"weights {str(source)!r}: no such file or directory")
    return path


def family_module(family: str):
    """What a family's files look like, by the protocol in load.py: its module, and `defaults` for
    what that leaves out."""
    return SimpleNamespace(**vars(defaults) | vars(importlib.import_module(f"reference_models.files.{family}")))


def described(checkpoint: Checkpoint, wanted):
    """(the configuration of a checkpoint, notes): from its settings where there are some, else from
    the model's name."""
    data, file, notes = checkpoint.data, checkpoint.settings, []
    kind = data.get("model_type") or data.get("architecture") or ("model_cfg" in data and "open_clip")
    if data and not kind and wanted is not None and "hidden_size" in data:
        data = {"model_type": kind_of(wanted), **data}  # BERT's first files do not say their type
    if "minilora" in data:
        found = saved_config(data["minilora"], file, wanted)
    else:
        read = (family_module(family).config_from_json(data) for family in FAMILIES) if data else ()
        found = next((config for config in read if config is not None), None)
    if found is not None:
        if wanted is not None and (found.family, kind_of(found)) != (wanted.family, kind_of(wanted)):
            kind = f"a checkpoint of the family {kind_of(found)}"
            raise ModelError(f"{checkpoint.path}: {kind}, but {wanted.name} was asked for ({file.name} says so)")
        check_config(found, file)
        return found, notes
    if wanted is None and not data:
        raise ModelError(f"{checkpoint.path}: no config.json says which model this is; name one")
    if wanted is None or kind:
        todo = "name a model" if wanted is None else f"they are not those of {wanted.name}; part the weights from them"
        if kind and (why := instead(kind)):
            raise ModelError(f"{file}: {kind}: {why}")
        raise ModelError(f"{file}: {kind or 'no model_type'}: not one of the families {', '.join(FAMILIES)}; {todo}")
    if data:
        notes.append(f"{file}: describes no model and was not read; the settings are those of {wanted.name}")
    return wanted, notes


def kind_of(config) -> str:
    """The family, or what a family of several models calls this one."""
    return getattr(config, "kind", config.family)


def saved_config(saved: dict, file: Path | str, base=None):
    """The configuration that asdict made `saved` of; what it lacks comes from `base`."""
    family = saved.get("family")
    if family not in FAMILIES:
        raise ModelError(f"{file}: minilora.family is {family!r}, not one of {', '.join(FAMILIES)}")
    module = family_module(family)
    config = base or type(module.config_for(module.names[0]))(name=saved.get("name", family))
    known = {field.name for field in fields(config)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if key in known}
    towers = {key: saved_config(v, file) for key, v in values.items() if isinstance(v, dict)}
    return replace(config, **values | towers)
