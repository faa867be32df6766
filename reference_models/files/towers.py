"""Rows of key tables for the towers of CLIP and SigLIP. `base` is what stands before a tower's
names; `kind` is open_clip, or the one of clip and siglip that transformers 4 and 5 name alike.
"""

from reference_models.files.names import BLOCK, PACKED, Entry, blocks, patches, rename, rows


def vision_rows(depth: int, base: str, kind: str, norm: str = "norm", scales: dict | None = None) -> list[Entry]:
    """Of the picture tower, with SigLIP's attention pooling. Of open_clip's options: norm, our name
    of the last one, and the scales of a block."""
    if kind == "open_clip":
        table = [rename("cls_token", f"{base}class_embedding", "vector"), *patches(f"{base}conv1", bias=False)]
        table += [rename("pos_embed", f"{base}positional_embedding", "batch")]
        table += rows("", base, {"norm_pre": "ln_pre", norm: "ln_post"})
        return table + blocks(depth, f"{base}transformer.resblocks.", BLOCK[kind] | (scales or {}), PACKED[kind])
    table = [rename("cls_token", f"{base}embeddings.class_embedding", "vector")]
    table += patches(f"{base}embeddings.patch_embedding", bias=kind == "siglip")
    table += [rename("pos_embed", f"{base}embeddings.position_embedding.weight", "batch")]
    # so spelled in the files
    table += rows("", base, {"norm": "post_layernorm", "norm_pre": "pre_layrnorm"})
    if kind == "siglip":
        pool = {"probe": "probe", "norm": "layernorm", "out_proj": "attention.out_proj"}
        pool |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        table += rows("attn_pool.", f"{base}head.", pool, {"attention.in_proj_": ("q_proj", "k_proj", "v_proj")})
    return table + blocks(depth, f"{base}encoder.layers.", BLOCK["clip"])


def text_rows(depth: int, base: str, kind: str) -> list[Entry]:
    """Of CLIP's text tower."""
    if kind == "open_clip":
        table = [rename("pos_embed", f"{base}positional_embedding", "batch")]
        table += rows("", base, {"norm": "ln_final", "token_embed.weight": "token_embedding.weight"})
        return table + blocks(depth, f"{base}transformer.resblocks.", BLOCK[kind], PACKED[kind])
    table = [rename("pos_embed", f"{base}embeddings.position_embedding.weight", "batch")]
    table += rows("", base, {"norm": "final_layer_norm", "token_embed.weight": "embeddings.token_embedding.weight"})
    return table + blocks(depth, f"{base}encoder.layers.", BLOCK["clip"])
