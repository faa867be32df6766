"""How a checkpoint wants its pictures: size, resize, interpolation, mean and standard deviation.

Read from processor_config.json and preprocessor_config.json (transformers), pretrained_cfg (timm's
config.json) or preprocess_cfg (open_clip), and written back in the same forms. Here it is one
dictionary:
  image_size     side of the square input, pixels
  resize         "squash": straight to resize_to x resize_to, whatever the picture's shape;
                 "shortest": shortest edge to resize_to, the ratio is kept
  resize_to      pixels; of a larger picture the middle image_size x image_size is taken
  crop           only where a middle is cut out, and how an odd border is halved: "down" as
                 transformers does, "even" as torchvision does (also where the key is missing)
  interpolation  "nearest", "lanczos", "bilinear", "bicubic", "box" or "hamming"
  mean, std      three numbers each, for pixel values in 0..1
"""

import re
from pathlib import Path

from reference_models.errors import ModelError
from reference_models.files.config_check import is_number
from reference_models.text.textfiles import read_json

# PIL's numbers are the positions
PIL_MODES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
# what transformers' image processors do where their file does not say: statistics, filter, size
PROCESSORS = {
    "ViT": HALF | {"resample": 2, "size": {"height": 224, "width": 224}},
    "DeiT": HALF | {"resample": 3, "size": {"height": 256, "width": 256}, "do_center_crop": True},
    "Beit": HALF | {"resample": 3, "size": {"height": 224, "width": 224}},
    "CLIP": OPENAI | {"resample": 3, "size": {"shortest_edge": 224}, "do_center_crop": True},
}
PROCESSORS["Bit"] = PROCESSORS["CLIP"]
PROCESSOR_OF = {"deit": "DeiT", "beit": "Beit", "clip": "CLIP"}  # by model_type; the others ViT
# checkpoints whose file names alone tell that they were trained with ImageNet's statistics
IMAGENET_NAMES = r"deit|dino|beit_?v2|(^|[_.-])(mae|moco|msn|ibot)([_.-]|$)"
CHOICES = {"squash": "squash", "crop": "shortest"}  # --resize
LARGEST = 1e6  # of sizes and statistics
FLAGS = "--mean --std --interpolation --resize --crop-pct, or load_pretrained(pictures={...}), change it"


def picture_settings(folder: Path, data: dict) -> tuple[dict, list[str]]:
    """(what the files of a checkpoint say of pictures, notes on what they say and is not done).

    The keys are those of the dictionary above, with `scale` (input, resized) in pixels instead of
    resize_to. {} where no file says anything.
    """
    files = (folder / name for name in ("processor_config.json", "preprocessor_config.json"))
    found = [read_json(file) for file in files if file.exists()]
    # transformers 5 nests the settings of pictures beside those of texts
    found = [file.get("image_processor", file) for file in found if file.get("image_processor", file.keys() & KNOWN)]
    beside = folder / "open_clip_config.json"
    open_clip = data.get("preprocess_cfg") or ((read_json(beside) if beside.exists() else {}).get("preprocess_cfg"))
    timm = data.get("pretrained_cfg")
    readers = [(_from_transformers, found[0] if found else None), (_from_timm, timm), (_from_open_clip, open_clip)]
    if "model_cfg" in data:
        readers.reverse()
    read, settings = next(((read, settings) for read, settings in readers if settings), (None, {}))
    if read is None:
        return {}, []
    try:
        return read(settings, data)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{folder}: the settings for pictures cannot be read: {error!r}") from None


KNOWN = {"size", "crop_size", "image_mean", "image_std", "resample", "do_resize", "do_normalize", "do_rescale"}
KNOWN |= {"do_center_crop", "rescale_factor", "image_processor_type", "feature_extractor_type"}


def _from_transformers(data: dict, model: dict) -> tuple[dict, list[str]]:
    """As the image processor of that name does."""
    named = data.get("image_processor_type") or data.get("feature_extractor_type") or ""
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", named)
    kind = kind or PROCESSOR_OF.get(model.get("model_type"), "ViT")
    notes = [] if kind in PROCESSORS else [f"{named} is read as transformers' plain image processor"]
    defaults = PROCESSORS.get(kind, PROCESSORS["ViT"])
    say = {key: defaults[key] if data.get(key) is None else data[key] for key in ("size", "resample")}
    mean, std = _statistics(data, defaults)
    found = {"mean": mean, "std": std, "interpolation": dict(enumerate(PIL_MODES))[say["resample"]]}
    if isinstance(size := say["size"], int):
        square = data.get("default_to_square", "shortest_edge" not in defaults["size"])
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    squash = "shortest_edge" not in size
    edge = size["height"] if squash else size["shortest_edge"]
    wide = squash and size["width"] != edge
    crop = data.get("crop_size") or 224
    crop = crop.get("height") or crop["shortest_edge"] if isinstance(crop, dict) else crop
    cropped = data.get("do_center_crop", defaults.get("do_center_crop", False))
    rounding = data.get("crop_rounding", "even" if "minilora" in model else "down")
    found |= {"resize": "squash" if squash else "shortest", "scale": (crop if cropped else edge, edge)}
    found |= {"crop": rounding} if cropped or not squash else {}
    # a square model has no use for another shape; of a model for one, `size` is its own
    undone = [f"size {size}"] * (wide and bool(cropped)) + ["longest_edge"] * ("longest_edge" in size)
    undone += ["do_resize false"] * (data.get("do_resize") is False)
    undone += [key for key in ("do_pad", "do_flip_channel_order", "crop_pct") if data.get(key)]
    return found, notes + [f"the checkpoint's {what} is not done here" for what in undone]


def _statistics(data: dict, defaults: dict) -> tuple[list, list]:
    """Mean and deviation for pixels in 0..1: (255 f x - m) / s = (x - m / (255 f)) / (s / (255 f)),
    with f the rescale factor, 1 without rescaling, and m = 0, s = 1 without normalisation."""
    mean, std = (
        defaults[ours] if data.get(theirs) is None else data[theirs]
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
    )
    if data.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    mean, std = (list(x) if isinstance(x, list) else [x] * 3 for x in (mean, std))
    factor = 1 / 255 if data.get("rescale_factor") is None else data["rescale_factor"]
    largest = 255 * (1 if data.get("do_rescale") is False else factor)
    if abs(largest - 1) < 1e-4:  # files have 1 / 255 with few digits too
        return mean, std
    return [m / largest for m in mean], [s / largest for s in std]


def _from_timm(data: dict, model: dict) -> tuple[dict, list[str]]:
    found = {key: data[key] for key in ("mean", "std", "interpolation") if data.get(key)}
    crop, mode = data.get("crop_pct") or 0.875, data.get("crop_mode") or "center"
    full = data.get("input_size", [3, 224, 224])[-1]
    outer = int(full / crop)
    found |= {"resize": "squash" if mode == "squash" else "shortest", "scale": (full, outer), "crop": "even"}
    undone = [f"the checkpoint's crop_mode {mode!r} is not done here"] * (mode not in ("center", "squash"))
    return found, undone


def _from_open_clip(data: dict, model: dict) -> tuple[dict, list[str]]:
    found = {key: data[key] for key in ("mean", "std", "interpolation") if data.get(key)}
    mode = data.get("resize_mode") or "shortest"
    found["resize"] = "squash" if mode == "squash" else "shortest"
    undone = [f"the checkpoint's resize_mode {mode!r} is not done here"] * (mode not in ("shortest", "squash"))
    return found, undone


def assumed_settings(family: dict, layout: str, name: str, distilled: bool = False) -> dict:
    """What to do with pictures where no file says it: what the family, the library that wrote the
    weights and the file's name tell."""
    if not family:
        return {}
    if layout == "torchvision":  # its reference evaluation of a classifier
        return family | IMAGENET | {"resize": "shortest", "scale": (224, 256)}
    if family["mean"] == HALF["mean"] and (distilled or re.search(IMAGENET_NAMES, name.lower())):
        return family | IMAGENET | {"interpolation": "bicubic"}
    return family


def preprocess_for(side, assumed: dict, said: dict, chosen: dict) -> dict:
    """The dictionary at the top of this file, {} for a model that sees no pictures.

    side: of the model's input. What was `chosen` (mean, std, interpolation, resize "squash" or
    "crop", crop_pct) wins over what files `said`, and this over what is `assumed`.
    """
    if unknown := chosen.keys() - {"mean", "std", "interpolation", "resize", "crop_pct"}:
        raise ModelError(f"pictures: {', '.join(sorted(unknown))} is no setting of pictures")
    if not assumed:
        return {}
    result = {"resize": "squash", **assumed}
    if "resize" in said:
        result.pop("scale", None)
    result |= said
    inner, outer = result.pop("scale", (side, side))
    result |= {key: chosen[key] for key in ("mean", "std", "interpolation") if key in chosen}
    if "crop_pct" in chosen or "resize" in chosen:
        share = chosen.get("crop_pct", 1.0)
        if chosen.get("resize", "crop") not in CHOICES or not is_number(share, LARGEST):
            raise ModelError("pictures: resize is squash or crop, crop_pct a share above 0 and at most 1")
        if not 0 < share <= 1:
            raise ModelError(f"pictures: crop_pct is above 0 and at most 1, not {share!r}")
        result |= {"resize": CHOICES[chosen.get("resize", "crop")], "crop": "even"}
        inner, outer = (side, int(side / share)) if isinstance(side, int) else (side, side)
    return _checked(result, side, inner, outer)


def _checked(result: dict, side, inner, outer) -> dict:
    """With resize_to in proportion to the size at which the model runs, and every value one that
    pictures can have."""
    if isinstance(side, int):
        if not all(is_number(one, LARGEST) and one > 0 for one in (inner, outer)):
            raise ModelError(f"the checkpoint's preprocessing: {inner!r} and {outer!r} are no picture sizes")
        outer = round(outer * side / inner)
    elif result["resize"] == "squash":
        outer = side
    crop = result.pop("crop", "even")
    if outer == side and result["resize"] == "squash" or crop == "even" and result["resize"] != "squash":
        crop = None
    mean, std = list(result["mean"]), list(result["std"])
    numbers = all(is_number(one, LARGEST) for one in (*mean, *std))
    if (len(mean), len(std)) != (3, 3) or not numbers or not all(std):
        raise ModelError(f"the checkpoint's preprocessing: mean {mean} and std {std} must be three numbers each")
    if result["interpolation"] not in PIL_MODES:
        raise ModelError(f"interpolation {result['interpolation']!r} is not one of {', '.join(PIL_MODES)}")
    result |= {"resize_to": outer, "image_size": side, "mean": mean, "std": std}
    return result | ({"crop": crop} if crop else {})


def describe_pictures(preprocess: dict, keys=("resize", "interpolation", "mean", "std")) -> str:
    """In words: "squashed to 224 x 224, bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"."""
    side, outer, squash = preprocess["image_size"], preprocess["resize_to"], preprocess["resize"] == "squash"
    square = "{0} x {0}".format if isinstance(side, int) else "{0[0]} x {0[1]}".format
    size = f"squashed to {square(outer)}" if squash else f"shortest edge to {outer}"
    if not squash or (outer != side and "crop" in preprocess):
        size += f", its middle {square(side)}"
    words = {"resize": size, "interpolation": preprocess["interpolation"]}
    words |= {key: f"{key} " + " ".join(f"{x:.4g}" for x in preprocess[key]) for key in ("mean", "std")}
    return ", ".join(words[key] for key in keys)


def assumption(preprocess: dict, said: set[str], name: str) -> list[str]:
    """One note on what of a model's `preprocess` is not among the keys said, [] where all is."""
    known = {"resize", *said} if "crop_pct" in said else said
    unsaid = [key for key in ("resize", "interpolation", "mean", "std") if key not in known]
    note = f"pictures: {describe_pictures(preprocess, unsaid)}: assumed, {name} does not say; {FLAGS}"
    return [note] if unsaid else []


def preprocess_to_json(preprocess: dict, layout: str, data: dict) -> dict[str, dict]:
    """{file name: content} of config.json and the layout's own file of these settings."""
    if not preprocess:
        return {"config.json": data}
    side, outer = preprocess["image_size"], preprocess["resize_to"]
    height, width = (side, side) if isinstance(side, int) else side
    squash, cropped = preprocess["resize"] == "squash", "crop" in preprocess
    if layout == "timm":
        pretrained = {key: preprocess[key] for key in ("mean", "std", "interpolation")}
        pretrained |= {"input_size": [3, height, width], "num_classes": data.get("num_classes", 0)}
        pretrained |= {
            "crop_pct": side / outer if isinstance(side, int) and (cropped or not squash) else 1.0,
            "crop_mode": "squash" if squash else "center",
        }
        return {"config.json": {**data, "pretrained_cfg": pretrained}}
    resized = {"height": outer, "width": outer} if cropped else {"height": height, "width": width}
    settings = {
        "do_resize": True,
        "size": resized if squash else {"shortest_edge": outer},
        "resample": PIL_MODES.index(preprocess["interpolation"]),
        "do_center_crop": cropped or not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }
    if layout == "open_clip":
        chosen = {key: preprocess[key] for key in ("mean", "std", "interpolation")}
        chosen |= {"size": side, "mode": "RGB", "resize_mode": "squash" if squash else "shortest"}
        return {"open_clip_config.json": {**data, "preprocess_cfg": chosen}}
    if settings["do_center_crop"]:
        # a word of ours: transformers' is always "down"
        settings["crop_rounding"] = preprocess.get("crop", "even")
    kind = "CLIP" if not squash else "DeiT" if cropped else "ViT"
    return {
        "config.json": data,
        "preprocessor_config.json": {"image_processor_type": f"{kind}ImageProcessor", **settings},
    }
