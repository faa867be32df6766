"""Where a vision transformer looks: last layer's attention and rollout, laid over the picture.

A layer's map is (B, h, T, T): row i says how token i shares its attention, so each row sums to 1.
Tokens are the P patches of the picture, after the model's prefix tokens: CLS, registers, none.
    last layer   the CLS row of the last map, mean over heads; without CLS the mean of all patches
    rollout      R = A_L ... A_2 A_1 with A_l = (I + mean over heads of map l) / 2: the identity
                 stands for the residual path, so R says how much of each patch has reached a
                 token after all L layers
Rollout: Abnar & Zuidema 2020, arXiv:2005.00928. Swin attends within windows: no rollout there, and
the last layer shows the attention that each patch receives within its own window.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minilora.report.samples import picture_table, square, to_picture

# A dark to light scale (violet, red, orange, yellow), so that attention reads in grey too.
_SCALE = np.array([[13, 8, 60], [106, 0, 148], [188, 48, 96], [238, 116, 40], [252, 250, 150]], dtype=np.float32)


def attention_rollout(maps: Sequence[Tensor]) -> Tensor:
    """maps: L of (B, h, T, T) -> (B, T, T), each row sums to 1."""
    T = maps[0].shape[-1]
    identity = torch.eye(T, dtype=maps[0].dtype, device=maps[0].device)
    result = identity
    for layer in maps:
        mixed = layer.mean(1) + identity  # (B, T, T)
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return result


def grid_of(tokens: int) -> tuple[int, int]:
    """(prefix tokens, side of the patch grid): 197 -> (1, 14), 49 -> (0, 7), 198 -> (2, 14)."""
    for prefix in range(min(9, tokens)):
        side = math.isqrt(tokens - prefix)
        if side * side == tokens - prefix:
            return prefix, side
    raise ValueError(f"{tokens} tokens are not a square grid of patches after at most 8 prefix tokens")


def patch_heat(attention: Tensor, tower: nn.Module | None = None) -> Tensor:
    """What the pooled token sees of each patch: (..., T, T) -> (..., rows, columns): row 0 with a
    class token, else (mean pooling) the mean over the patches. Which tokens stand before them the
    tower says; where it does not, their number is read from T."""
    if hasattr(tower, "prefix"):
        prefix, grid, token = tower.prefix, tower.config.grid, tower.cls_token is not None
    else:
        prefix, side = grid_of(attention.shape[-1])
        grid, token = (side, side), prefix > 0
    patches = attention[..., prefix:]  # (..., T, P)
    return (patches[..., 0, :] if token else patches[..., prefix:, :].mean(-2)).unflatten(-1, grid)


def window_heat(last: Tensor, batch: int) -> Tensor:
    """Swin's last map (B * nW, h, w, w) -> (B, h, H, W): attention received within the window,
    windows put together.

    With more than one window the last block of a stage is the shifted one, so the picture is rolled
    back by half a window. Raises ValueError where the windows do not make a square.
    """
    windows, side = last.shape[0] // batch, math.isqrt(last.shape[-1])
    grid = math.isqrt(windows)
    if side * side != last.shape[-1] or grid * grid * batch != last.shape[0]:
        raise ValueError(f"windows of {last.shape[-1]} tokens, {windows} per picture, do not make a square")
    received = last.mean(-2).unflatten(-1, (side, side))  # (B * nW, h, side, side)
    tiles = received.unflatten(0, (batch, grid, grid))  # (B, gy, gx, h, side, side)
    heat = tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, last.shape[1], grid * side, grid * side)
    return heat if grid == 1 else heat.roll((side // 2, side // 2), (-2, -1))


@torch.no_grad()
def layer_heats(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{"layer 1": (B, h, side, side), ..., "rollout": (B, 1, side, side)} of images (B, 3, H, W);
    the last layer alone where it has windows, {} for a model without attention.

    `model` has attention_maps(x), or its tower `.vision` has; it is used in eval mode.
    """
    tower = getattr(model, "vision", model)
    was_training = tower.training
    maps = [layer.float() for layer in tower.eval().attention_maps(images)]
    tower.train(was_training)
    if maps and (maps[-1].shape[0] != images.shape[0] or len({layer.shape for layer in maps}) > 1):
        return {f"layer {len(maps)}": window_heat(maps[-1], images.shape[0])}
    heats = {f"layer {n}": patch_heat(layer, tower) for n, layer in enumerate(maps, 1)}
    return heats | ({"rollout": patch_heat(attention_rollout(maps), tower)[:, None]} if maps else {})


def attention_heats(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(last layer per head (B, h, side, side), rollout (B, side, side) or None for windows)."""
    heats = layer_heats(model, images)
    rollout = heats.pop("rollout", None)
    return list(heats.values())[-1], rollout if rollout is None else rollout[:, 0]


def attention_figure(
    models: Mapping[str, nn.Module],
    images: Tensor,
    per_head: bool = False,
    titles: Sequence[str] = (),
    side: int = 150,
    said: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """One row per picture: the picture, then last layer and rollout (and each head) for each of the
    models. Models that look at the same places share their columns.

    images (N, 3, H, W) normalised by the models' `preprocess`; models such as {"base": ..., "LoRA":
    ...}; said: {model: its answer to each picture}, below its maps. Each heat is stretched from its
    least to its greatest value, so that pictures can be compared by place, not by strength.
    """
    first = next(iter(models.values()))
    preprocess = getattr(first, "preprocess", None) or first.vision.preprocess
    pictures = [square(to_picture(image, preprocess), side) for image in images.cpu()]
    rows, heads = [[picture] for picture in pictures], ["picture"]
    captions = [[""] for _ in pictures]
    seen: list[tuple[list[str], Tensor, Tensor | None]] = []  # names, and what they share
    for name, model in models.items():
        device = next(model.parameters()).device
        last, rollout = attention_heats(model, images.to(device))
        same = next((names for names, other, _ in seen if torch.equal(last, other)), None)
        same.append(name) if same else seen.append(([name], last, rollout))
    for names, last, rollout in seen:
        layers = [("last layer", last.mean(1))] + ([("rollout", rollout)] if rollout is not None else [])
        if per_head:
            layers += [(f"head {head}", last[:, head]) for head in range(last.shape[1])]
        answers = [one for name in names if (one := (said or {}).get(name))]
        for number, (title, heat) in enumerate(layers):
            heads.append(f"{', '.join(names)} {title}")
            for i, (picture, one) in enumerate(zip(pictures, heat.cpu(), strict=True)):
                rows[i].append(overlay(picture, one.numpy()))
                captions[i].append(" / ".join(one[i] for one in answers) * (number == 0))
    return picture_table(rows, list(titles), heads, side, captions if said else ())


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey below the heat (rows, columns), stretched to 0..1, smoothed and coloured.

    Full brightness begins at the 97th percentile: trained ViTs store global facts in a few
    background patches that draw far more attention than all others (Darcet et al. 2023,
    arXiv:2309.16588) and would leave the rest black.
    """
    low, high = float(heat.min()), float(np.quantile(heat, 0.97))
    if high <= low:
        high = float(heat.max())
    heat = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)  # (H, W)
    scaled = level * (len(_SCALE) - 1)
    step = np.clip(scaled.astype(int), 0, len(_SCALE) - 2)
    # (H, W, 3)
    colour = _SCALE[step] + (scaled - step)[..., None] * (_SCALE[step + 1] - _SCALE[step])
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.4 * grey + 0.6 * colour).round().astype(np.uint8))
