"""The command `python -m minilora.data.shards SRC DST`: pictures and tokens for a model, prepared once."""

import dataclasses
import os
from collections.abc import Sequence

from minilora.config import Parser
from minilora.data.shards import write_shards
from minilora.data.vqa_batches import Texts
from minilora.errors import UserError
from minilora.flags import Config, flag
from minilora.tasks import base
from minilora.tasks.vqa import open_data
from minilora.tasks.vqa_model import DEFAULT_MODEL, open_tokenizer, tower_names, tower_of, tower_weights
from reference_models.load import config_for

USED = ("model", "weights", "tokenizer", "data_format", "val_split", "split_by", "subset", "seed", "bad_data")
USED += ("image_size", "max_length")  # the flags of train.py that shards depend on
ShardConfig = dataclasses.make_dataclass(
    "ShardConfig",
    [
        *(
            (f.name, f.type, flag_of)
            for f in dataclasses.fields(Config)
            if f.name in USED
            for flag_of in [dataclasses.field(default=f.default, metadata=f.metadata)]
        ),
        ("shard_mb", float, flag("output", 256.0, "size of a shard in MiB", float, above=0)),
    ],
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(ShardConfig, "python -m minilora.data.shards", "SRC DST [flags]", __doc__)
    parser.add_argument(
        "source", metavar="SRC", help="a folder of VQA v2 questions; shapes: the generated ones"
    )
    parser.add_argument("target", metavar="DST", help="the folder for the shards")
    typed, args = parser.read(argv)
    shard_mb = typed.pop("shard_mb", ShardConfig.shard_mb)
    source = None if args.source == "shapes" else args.source
    config = Config(**typed, task="vqa", data_dir=source)
    base.resolve(config, DEFAULT_MODEL)
    if config.data_format == "shards":
        raise UserError("--data-format shards: SRC must be the files that shards are made of")
    splits = open_data(config)
    weights = tower_weights(config)
    names, settings = tower_names(config)
    whole, _ = base.load_base(
        names["vision"], weights["vision"], config.seed, None, config.image_size, **settings
    )
    tokenizer = open_tokenizer(config, weights)
    longest = getattr(
        None if os.path.isdir(names["text"]) else config_for(names["text"]), "max_positions", None
    )
    limit = min(config.max_length or tokenizer.max_length, longest or tokenizer.max_length)
    made = {"source": config.data_dir, "max_length": limit}
    made |= {name: getattr(config, name) for name in ("val_split", "split_by", "subset", "seed", "bad_data")}

    def tokens(part):
        texts = Texts(part.questions, tokenizer, limit)
        return [texts.ids[row] for row in texts.row]

    preprocess = tower_of(whole, "vision").preprocess
    index = write_shards(args.target, splits.parts, preprocess, tokens, made, shard_mb, config.bad_data)
    tokenizer.save(args.target)
    print(f"{args.target}: {len(index['shards'])} shards; train with: --task vqa --data-dir {args.target}")
    return 0
