"""Every configuration that comes with open_clip, small, with random weights: does its folder load and give the same
vectors and logits, or is it refused with a sentence? None may load and differ.

    python -m tests.reference_models.open_clip_names [BEGINNING]     counts, and a line for each refused or wrong one

Smaller are the depths, the width of open_clip's own towers, the vocabularies and the towers of transformers, whose
configurations are written here; a tower of timm keeps its width, which its name stands for, and has two blocks.
"""

import json
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from reference_models import ModelError, load_pretrained
from reference_models.load import config_of
from tests.support.parity import distance, fill, pictures
from tests.support.text_parity import write_checkpoint

VOCABULARY = 120
HF = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HF |= {"intermediate_size": 64, "max_position_embeddings": 40, "type_vocab_size": 1, "pad_token_id": 1}
TRANSFORMERS = {  # what hf_model_name begins with: its configuration
    "roberta": {"model_type": "roberta", **HF},
    "xlm-roberta": {"model_type": "xlm-roberta", **HF},
    "google/mt5": {
        "model_type": "mt5",
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "d_kv": 12,
        "d_ff": 64,
        "num_layers": 2,
    },
    "facebook/nllb": {"model_type": "m2m_100", "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2}
    | {"encoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 4}
    | {"decoder_ffn_dim": 64, "max_position_embeddings": 40},
}


def small(config: dict, folder: Path) -> dict:
    """The same model with smaller towers."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "timm_model_name" not in vision:
        vision |= {"width": 64, "head_width": 16, "image_size": 4 * (vision.get("patch_size") or 16)}
        vision["layers"] = [1, 1, 1, 1] if isinstance(vision["layers"], list) else 2
        config = config | {"embed_dim": 48}
    if "hf_model_name" in text:
        begins = max((name for name in TRANSFORMERS if text["hf_model_name"].startswith(name)), key=len)
        tower = folder / "tower"
        tower.mkdir()
        (tower / "config.json").write_text(json.dumps(TRANSFORMERS[begins]))
        text |= {"hf_model_name": str(tower), "hf_model_pretrained": False}
    else:
        width = config["embed_dim"] if text.get("proj_type") == "none" else 32
        text |= {"width": width, "heads": 4, "layers": 2, "context_length": 10, "vocab_size": VOCABULARY}
    return config | {"vision_cfg": vision, "text_cfg": text}


@contextmanager
def two_blocks():
    """Inside, timm makes its vision transformers with two blocks."""
    import timm
    from timm.models import vision_transformer

    create = timm.create_model

    def shallow(name, *arguments, **options):
        deep = name.startswith("vit_") and getattr(vision_transformer, name, None) is not None
        return create(name, *arguments, **options, **({"depth": 2} if deep else {}))

    timm.create_model = shallow
    try:
        yield
    finally:
        timm.create_model = create


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """("right" | "refused" | "differs" | "traceback", what it says)."""
    import open_clip

    config = small(open_clip.get_model_config(name), folder)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    written = {"model_cfg": {**config, **({"custom_text": True} if custom else {})}}
    write_checkpoint(folder, {}, written, "open_clip_model.safetensors")
    try:
        config_of(folder)  # refusals need no weights, of which some of these have billions
        with two_blocks():
            oracle = fill(kind(**config))
        write_checkpoint(folder, oracle.state_dict(), written, "open_clip_model.safetensors")
        model = load_pretrained(folder).eval().double()
    except ModelError as error:
        return "refused", str(error).replace(str(folder), "")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    length = getattr(model.config, "context", 10) if "hf_model_name" not in config["text_cfg"] else 12
    ids = torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))
    pad, end = (1, 2) if "hf_model_name" in config["text_cfg"] else (0, config["text_cfg"].get("eos_id", 119))
    for row, last in enumerate((length - 1, length // 2, 2)):
        ids[row, last], ids[row, last + 1 :] = end, pad
    x, oracle = pictures(model.config.image_size).double(), oracle.double()
    with torch.no_grad():
        pairs = [
            (model.encode_image(x), oracle.encode_image(x)),
            (model.encode_text(ids), oracle.encode_text(ids)),
            (model(x, ids)[0], oracle.get_logits(x, ids)[0]),
        ]
    found = max(distance(ours, theirs) for ours, theirs in pairs)
    return ("right", "") if found <= 1e-9 else ("differs", f"{found:.1e}")


def main(beginning: str = "") -> Counter:
    import open_clip

    counts: Counter = Counter()
    for name in sorted(name for name in open_clip.list_models() if name.startswith(beginning)):
        with tempfile.TemporaryDirectory() as folder:
            kind, message = outcome(name, Path(folder))
        counts[kind] += 1
        if kind != "right":
            print(f"{kind:10} {name}: {message}", flush=True)
    print(dict(counts))
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
