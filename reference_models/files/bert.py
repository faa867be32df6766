"""The files of BERT checkpoints. See load.py for the protocol."""

from dataclasses import replace

from reference_models.bert import Bert, BertConfig
from reference_models.errors import ModelError
from reference_models.files.fields import ENCODER_FIELDS, read_fields
from reference_models.files.names import Entry, blocks, rows

build = Bert
layouts = {"transformers4": ("", "bert."), "transformers5": ("", "bert.")}
# heads of the pre-training and fine-tuned models; a buffer
ignored = r"^(cls|classifier|qa_outputs)\.|position_ids$"
optional = r"^pooler"

#                                 vocabulary positions width depth heads hidden
MODELS = {
    "bert-nano": BertConfig("bert-nano", 4000, 128, 128, 3, 4, 512),
    "bert-tiny": BertConfig("bert-tiny", 30522, 512, 128, 2, 2, 512),
    "bert-base": BertConfig("bert-base", 30522, 512, 768, 12, 12, 3072),
}
names, config_for = list(MODELS), MODELS.get

PARTS = {
    "attn.q_proj": "attention.self.query",
    "attn.k_proj": "attention.self.key",
    "attn.v_proj": "attention.self.value",
    "attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}

FIELDS = {  # ours: (transformers' name in config.json, its default)
    "vocab_size": ("vocab_size", 30522),
    "max_positions": ("max_position_embeddings", 512),
    "type_vocab": ("type_vocab_size", 2),
    **{key: ENCODER_FIELDS[key] for key in ("dim", "depth", "heads", "hidden", "eps", "act")},
}


def key_table(config: BertConfig, layout: str, parts: dict[str, str] = PARTS) -> list[Entry]:
    """Our names beside those of transformers' BertModel, versions 4 and 5 alike."""
    outside = {f"{kind}.weight": f"{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    table = rows("embeddings.", "embeddings.", outside | {"norm": "LayerNorm"})
    return table + rows("", "", {"pooler.dense": "pooler.dense"}) + blocks(config.depth, "encoder.layer.", parts)


def fit_config(config: BertConfig, shapes: dict[str, tuple]) -> BertConfig:
    """A file without pooler (masked language models have none) makes a model without one."""
    return replace(config, pooler="pooler.dense.weight" in shapes)


def config_from_json(data: dict) -> BertConfig | None:
    if data.get("model_type") != "bert":
        return None
    check_encoder(data)
    values = read_fields(data, FIELDS)
    return BertConfig(name=f"bert-{values['dim']}-{values['depth']}", **values)


def check_encoder(data: dict) -> None:
    """ModelError for options of config.json that make another model than a plain encoder."""
    for key in ("is_decoder", "add_cross_attention"):
        if data.get(key):
            raise ModelError(f"config.json: {key} is true, a text decoder; only {data['model_type']} as an encoder is "
                             "supported")  # fmt: skip
    if (kind := data.get("position_embedding_type", "absolute")) != "absolute":
        raise ModelError(f"config.json: position_embedding_type {kind!r} is not supported, only 'absolute'")


def config_to_json(config: BertConfig, layout: str) -> dict:
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()}
    fixed = {"architectures": ["BertModel"], "model_type": "bert", "pad_token_id": 0}
    return {**fixed, "position_embedding_type": "absolute", **values}
