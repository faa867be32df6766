"""How a checkpoint wants its pictures: size, resize, interpolation, mean and standard deviation.

Read from preprocessor_config.json (transformers), pretrained_cfg (timm's config.json) or
preprocess_cfg (open_clip), and written back in the same forms. Here it is one dictionary:
  image_size     side of the square input, pixels
  resize         "squash": straight to image_size x image_size;
                 "shortest": shortest edge to resize_to, then a centre crop
  resize_to      pixels
  interpolation  "nearest", "lanczos", "bilinear", "bicubic", "box" or "hamming"
  mean, std      three numbers each, for pixel values in 0..1
"""

from pathlib import Path

from reference_models.errors import ModelError
from reference_models.text.textfiles import read_json

# PIL's numbers are the positions
PIL_MODES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def preprocessor_files(folder: Path, data: dict) -> tuple[dict, dict, dict]:
    """(preprocessor_config.json, timm's pretrained_cfg, open_clip's preprocess_cfg),
    empty where absent."""
    path = folder / "preprocessor_config.json"
    open_clip = folder / "open_clip_config.json"
    return (
        read_json(path) if data and path.exists() else {},
        data.get("pretrained_cfg") or {},
        (read_json(open_clip) if open_clip.exists() else data).get("preprocess_cfg") or {},
    )


def preprocess_for(defaults: dict, transformers: dict, timm: dict, open_clip: dict, config) -> dict:
    """The dictionary above for one checkpoint; what its files do not say comes from `defaults`, the
    size from config."""
    if not defaults:
        return {}
    side = getattr(config, "image_size", None)
    result = {"resize": "squash", "resize_to": side, **defaults}
    try:
        if transformers:
            result |= _from_transformers(transformers, result)
        elif timm:
            crop = timm.get("crop_pct") or 1.0
            shortest = timm.get("crop_mode", "center") != "squash"
            result |= {key: timm[key] for key in ("mean", "std", "interpolation") if timm.get(key)}
            full = timm.get("input_size", [3, side, side])[-1]
            result |= {"resize": "shortest" if shortest else "squash", "resize_to": int(full / crop)}
            result["scale"] = (full, int(full / crop))
        elif open_clip:
            result |= {key: open_clip[key] for key in ("mean", "std", "interpolation") if open_clip.get(key)}
            result["resize"] = "squash" if open_clip.get("resize_mode") == "squash" else "shortest"
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ModelError(f"the checkpoint's preprocessing settings cannot be read: {error!r}") from None
    return _to_size(result, side)


def _from_transformers(data: dict, result: dict) -> dict:
    size, crop = data.get("size"), data.get("crop_size")
    found = {"mean": data["image_mean"]} if data.get("image_mean") else {}
    found |= {"std": data["image_std"]} if data.get("image_std") else {}
    if isinstance(data.get("resample"), int):
        found["interpolation"] = PIL_MODES[data["resample"]]
    if isinstance(size, dict):
        edge = size.get("shortest_edge") or size.get("height")
        squash = "shortest_edge" not in size and not data.get("do_center_crop")
    else:
        edge, squash = size, not data.get("do_center_crop")
    if edge:
        inner = crop.get("height") if isinstance(crop, dict) else crop
        inner = inner if data.get("do_center_crop") and inner else edge
        found |= {"resize": "squash" if squash else "shortest", "resize_to": edge, "scale": (inner, edge)}
    return found


def _to_size(result: dict, side) -> dict:
    """Keep the proportion of resize_to to the input size when the model runs at another size
    than the file says."""
    inner, outer = result.pop("scale", (side, result.get("resize_to") or side))
    if isinstance(side, int) and inner:
        if not all(isinstance(one, (int, float)) and 0 < one < 1e6 for one in (inner, outer)):
            raise ModelError(f"the checkpoint's preprocessing: {inner!r} and {outer!r} are no picture sizes")
        result["resize_to"] = round(outer * side / inner)
    mean, std = list(result["mean"]), list(result["std"])
    if not all(len(three) == 3 and all(isinstance(x, (int, float)) for x in three) for three in (mean, std)):
        raise ModelError(f"the checkpoint's preprocessing: mean {mean} and std {std} must be three numbers each")
    return {**result, "image_size": side, "mean": mean, "std": std}


def preprocess_to_json(preprocess: dict, layout: str, data: dict) -> dict[str, dict]:
    """{file name: content}: config.json, and where the layout has one a file of
    preprocessing settings."""
    if not preprocess:
        return {"config.json": data}
    side, outer = preprocess["image_size"], preprocess["resize_to"]
    height, width = (side, side) if isinstance(side, int) else side
    squash = preprocess["resize"] == "squash"
    if layout == "timm":
        pretrained = {key: preprocess[key] for key in ("mean", "std", "interpolation")}
        pretrained |= {"input_size": [3, height, width], "num_classes": data.get("num_classes", 0)}
        pretrained |= {
            "crop_pct": 1.0 if squash or not isinstance(side, int) else side / outer,
            "crop_mode": "squash" if squash else "center",
        }
        return {"config.json": {**data, "pretrained_cfg": pretrained}}
    settings = {
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": outer},
        "resample": PIL_MODES.index(preprocess["interpolation"]),
        "do_center_crop": not squash,
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
    kind = {"clip": "CLIPImageProcessor"}.get(data.get("model_type"), "ViTImageProcessor")
    return {"config.json": data, "preprocessor_config.json": {"image_processor_type": kind, **settings}}
