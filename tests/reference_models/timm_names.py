"""Every architecture of timm whose name begins with vit, deit, beit, swin or eva, small, with random weights: does its
folder load and give the same logits, or is it refused with a sentence? None may load and differ.

    python -m tests.reference_models.timm_names            counts, and one line for each that is refused or wrong
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from reference_models import ModelError, load_pretrained
from tests.support.parity import distance, fill, logits_of, pictures

BEGINNINGS = ("vit", "deit", "beit", "swin", "eva")
# what shrinks a model; the first that its constructor takes and that makes one
SMALL = (
    {"depth": 2, "embed_dim": 32, "num_heads": 4},
    {"depth": 2, "embed_dim": 48, "num_heads": 2},
    {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6), "img_size": 64, "window_size": 4},
    {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6)},
    {"depth": 2},
    {},
)


def small(name: str, limit: int = 60_000_000):
    """A small model of the architecture, None where none can be built small."""
    import timm

    patch = next((int(word.removeprefix("patch")) for word in name.split("_") if word.startswith("patch")), 16)
    for sizes in SMALL:
        sizes = {"img_size": 4 * patch, **sizes}
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(name, num_classes=5, **sizes).parameters())
            if count < limit:
                return timm.create_model(name, pretrained=False, num_classes=5, **sizes), sizes
        except Exception:
            continue
    return None


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """("right" | "refused" | "differs" | "traceback" | "large", what it says)."""
    from timm.models import save_for_hf

    built = small(name)
    if built is None:
        return "large", ""
    oracle, sizes = fill(built[0]).double(), built[1]
    save_for_hf(oracle.float(), folder, model_args={**sizes}, safe_serialization=True)
    try:
        model = load_pretrained(folder).eval().double()
    except ModelError as error:
        return "refused", str(error).replace(str(folder), "")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    x = pictures(oracle.double().patch_embed.img_size).double()
    found = distance(logits_of(model, x), logits_of(oracle, x))
    return ("right", "") if found <= 1e-9 else ("differs", f"{found:.1e}")


def main(beginnings=BEGINNINGS) -> Counter:
    import timm

    counts: Counter = Counter()
    for name in sorted(name for name in timm.list_models() if name.startswith(tuple(beginnings))):
        with tempfile.TemporaryDirectory() as folder:
            kind, message = outcome(name, Path(folder))
        counts[kind] += 1
        if kind != "right":
            print(f"{kind:10} {name}: {message}", flush=True)
    print(dict(counts))
    return counts


if __name__ == "__main__":
    main(sys.argv[1:] or BEGINNINGS)
