"""Rows of key tables for the towers of CLIP and SigLIP. `base` is what stands before a tower's
names; `kind` is open_clip, or the one of clip and siglip that transformers 4 and 5 name alike.
"""

from reference_models.files.names import Entry, fused, linear, rename
from reference_models.files.shared import BLOCK, PACKED, blocks, patches


def vision_rows(depth: int, base: str, kind: str, norm: str = "norm", single: dict | None = None) -> list[Entry]:
    """Of the picture tower, with SigLIP's attention pooling. Of open_clip's options: norm, our name
    of the last one, and what is `single` in a block."""
    if kind == "open_clip":
        table = [rename("cls_token", f"{base}class_embedding", "vector"), *patches(f"{base}conv1", bias=False)]
        table += [rename("pos_embed", f"{base}positional_embedding", "batch")]
        table += [*linear("norm_pre", f"{base}ln_pre"), *linear(norm, f"{base}ln_post")]
        return table + blocks(depth, f"{base}transformer.resblocks.", BLOCK[kind], PACKED[kind], single)
    table = [rename("cls_token", f"{base}embeddings.class_embedding", "vector")]
    table += patches(f"{base}embeddings.patch_embedding", bias=kind == "siglip")
    table += linear("norm", f"{base}post_layernorm")
    table += [rename("pos_embed", f"{base}embeddings.position_embedding.weight", "batch")]
    table += linear("norm_pre", f"{base}pre_layrnorm")  # so spelled in the files
    if kind == "siglip":
        pool, head = "attn_pool", f"{base}head"
        table += [rename(f"{pool}.probe", f"{head}.probe"), *linear(f"{pool}.out_proj", f"{head}.attention.out_proj")]
        qkv = [f"{pool}.{n}_proj" for n in "qkv"]
        table += fused(qkv, f"{head}.attention.in_proj_weight", f"{head}.attention.in_proj_bias")
        for ours, theirs in (("norm", "layernorm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            table += linear(f"{pool}.{ours}", f"{head}.{theirs}")
    return table + blocks(depth, f"{base}encoder.layers.", BLOCK["clip"])


def text_rows(depth: int, base: str, kind: str) -> list[Entry]:
    """Of CLIP's text tower."""
    if kind == "open_clip":
        table = [rename("pos_embed", f"{base}positional_embedding", "batch"), *linear("norm", f"{base}ln_final")]
        table += [rename("token_embed.weight", f"{base}token_embedding.weight")]
        return table + blocks(depth, f"{base}transformer.resblocks.", BLOCK[kind], PACKED[kind])
    table = [rename("pos_embed", f"{base}embeddings.position_embedding.weight", "batch")]
    table += [rename("token_embed.weight", f"{base}embeddings.token_embedding.weight")]
    return table + linear("norm", f"{base}final_layer_norm") + blocks(depth, f"{base}encoder.layers.", BLOCK["clip"])
