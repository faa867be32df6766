"""The files of RoBERTa, XLM-RoBERTa, DistilBERT and MPNet. See load.py for the protocol."""

from dataclasses import replace

from reference_models.bert_variants import BertVariant, BertVariantConfig
from reference_models.errors import ModelError
from reference_models.files import bert
from reference_models.files.fields import read_fields
from reference_models.files.names import Entry, rename

build = BertVariant
PREFIXES = ("", "roberta.", "distilbert.", "mpnet.")
layouts = {"transformers4": PREFIXES, "transformers5": PREFIXES}
# heads of the pre-training and fine-tuned models; a buffer
ignored = r"^(lm_head|classifier|qa_outputs|pre_classifier|vocab_(transform|layer_norm|projector))\.|position_ids$"
optional, fit_config = bert.optional, bert.fit_config

#             kind, vocabulary, sizes (d, depth, heads, hidden)
BASE, LARGE, HALF = (768, 12, 12, 3072), (1024, 24, 16, 4096), (768, 6, 12, 3072)
SIZES = {
    "roberta-base": ("roberta", 50265, BASE),
    "roberta-large": ("roberta", 50265, LARGE),
    "distilroberta-base": ("roberta", 50265, HALF),
    "xlm-roberta-base": ("xlm-roberta", 250002, BASE),
    "xlm-roberta-large": ("xlm-roberta", 250002, LARGE),
    "distilbert-base": ("distilbert", 30522, HALF),
    "mpnet-base": ("mpnet", 30527, BASE),
}
CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert", "mpnet": "MPNet"}
OWN = {"eps": 1e-5, "type_vocab": 1}
# what config.json does not say: that class has it written in
FIXED = {
    "distilbert": {"counted": False, "type_vocab": 0, "pad_id": 0, "eps": 1e-12, "pooler": False},
    "mpnet": {"type_vocab": 0, "pad_id": 1, "relative_buckets": 32},
}
# ours: (transformers' name in config.json, its default)
FIELDS = dict.fromkeys(CLASSES, bert.FIELDS | {"pad_id": ("pad_token_id", 1)})
FIELDS["mpnet"] = {ours: pair for ours, pair in bert.FIELDS.items() if ours != "type_vocab"}
FIELDS["distilbert"] = {key: bert.FIELDS[key] for key in ("vocab_size", "max_positions")} | {
    "dim": ("dim", 768),
    "depth": ("n_layers", 6),
    "heads": ("n_heads", 12),
    "hidden": ("hidden_dim", 3072),
    "act": ("activation", "gelu"),
}
PROJECTIONS = ("q", "k", "v", "out")
PARTS = {  # of one block, where they are not BERT's
    "distilbert": {f"attn.{part}_proj": f"attention.{part}_lin" for part in PROJECTIONS}
    | {"norm1": "sa_layer_norm", "norm2": "output_layer_norm", "mlp.fc1": "ffn.lin1", "mlp.fc2": "ffn.lin2"},
    "mpnet": bert.PARTS
    | {f"attn.{part}_proj": f"attention.attn.{part[0]}" for part in PROJECTIONS}
    | {"norm1": "attention.LayerNorm"},
}


MODELS = {
    name: BertVariantConfig(name, vocabulary, 512, *sizes, kind=kind, **OWN | FIXED.get(kind, {}))
    for name, (kind, vocabulary, sizes) in SIZES.items()
}
names, config_for = list(MODELS), MODELS.get


def key_table(config: BertVariantConfig, layout: str) -> list[Entry]:
    """Our names beside those of transformers, versions 4 and 5 alike."""
    table = bert.key_table(config, layout, PARTS.get(config.kind, bert.PARTS))
    if config.kind == "distilbert":
        table = [row._replace(theirs=row.theirs.replace("encoder.layer.", "transformer.layer.")) for row in table]
    return table + [rename("relative_bias.table.weight", "encoder.relative_attention_bias.weight")]


def config_from_json(data: dict) -> BertVariantConfig | None:
    kind = data.get("model_type")
    if kind not in CLASSES:
        return None
    bert.check_encoder(data)
    if (buckets := data.get("relative_attention_num_buckets", 32)) != 32:
        raise ModelError(
            f"config.json: relative_attention_num_buckets {buckets!r}: transformers computes with 32 alone"
        )
    values = read_fields(data, FIELDS[kind]) | FIXED.get(kind, {})
    config = BertVariantConfig(name=f"{kind}-{values['dim']}-{values['depth']}", kind=kind, **values)
    return replace(config, max_positions=config.max_positions - config.first_position)


def config_to_json(config: BertVariantConfig, layout: str) -> dict:
    data = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS[config.kind].items()}
    data["max_position_embeddings"] += config.first_position
    if config.kind == "mpnet":
        data["relative_attention_num_buckets"] = config.relative_buckets
    return {"architectures": [f"{CLASSES[config.kind]}Model"], "model_type": config.kind, **data}
