"""python -m minilora.commands.shards SRC DST: pictures and questions for a model, prepared once."""

import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Any

from minilora.data.questions.vqa2 import has_questions
from minilora.errors import UserError
from minilora.settings.exit_codes import run
from minilora.settings.flags import PICTURE_FLAGS, Config, flag, flags_of
from minilora.settings.parse import Parser
from minilora.tasks.method import one_value, resolve
from minilora.tasks.weights import load_base, picture_flags
from reference_models import ModelError

# the flags of train.py that shards depend on
USED = ("task", "model", "weights", "tokenizer", "data_format", "val_split", "split_by", "subset", "seed")
USED += ("bad_data", "image_size", "max_length", "multi_label", *PICTURE_FLAGS)
# fmt: off
OWN = [
    ("shard_mb", float, flag("output", 256.0, "size of a shard in MiB", float, above=0)),
    ("wide", int, flag("output", None, "side of the training pictures that --augment crops; 0: none", int,
        low=0, high=4096, tasks=("classify",), shown="8/7 of the model's")),
]
# fmt: on
ShardConfig = make_dataclass("ShardConfig", flags_of(Config, *USED) + OWN)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(ShardConfig, "python -m minilora.commands.shards", "SRC DST [flags]", __doc__)
    what = "class folders, a table, or VQA v2 questions; shapes: the generated ones (of --task)"
    parser.add_argument("source", metavar="SRC", help=what)
    parser.add_argument("target", metavar="DST", help="the folder for the shards")
    typed, args = parser.read(argv)
    if "task" not in typed and has_questions(args.source):
        typed["task"] = "vqa"
    own = {name: typed.pop(name, getattr(ShardConfig, name)) for name in ("shard_mb", "wide")}
    config = Config(**typed, data_dir=None if args.source == "shapes" else args.source)
    if config.data_format == "shards":
        raise UserError("--data-format shards: SRC must be the files that shards are made of")
    if config.multi_label:
        raise UserError("--multi-label: shards hold one label for each picture; train from the table itself")
    if config.task == "choice":
        raise UserError("--task choice trains from its files; shards are for --task classify and vqa")
    index = (write_pictures if config.task == "classify" else write_questions)(config, args.target, **own)
    print(f"{args.target}: {len(index['shards'])} shards; train with: --task {config.task} --data-dir {args.target}")
    return 0


def made_of(config: Config, *names: str) -> dict[str, Any]:
    """The flags that tell one set of shards from another."""
    names = ("val_split", "subset", "seed", "bad_data", *names)
    return {"source": config.data_dir} | {name: getattr(config, name) for name in names}


def write_pictures(config: Config, target: str, shard_mb: float, wide: int | None) -> dict:
    """Classification: the pictures in the size of --model; returns the index."""
    from minilora.data.shards.pictures import write_picture_shards
    from minilora.tasks.classify.task import DEFAULT_MODEL, open_data

    resolve(config, DEFAULT_MODEL)
    splits = open_data(config)
    name, weights = one_value(config, "model"), one_value(config, "weights")
    model, _ = load_base(name, weights, config.seed, None, config.image_size, picture_flags(config))
    wide = round(model.preprocess["image_size"] * 8 / 7) if wide is None else wide
    return write_picture_shards(target, splits, model.preprocess, wide, made_of(config), shard_mb, config.bad_data)


def write_questions(config: Config, target: str, shard_mb: float, wide: None) -> dict:
    """VQA: pictures and token ids for the two towers of --model; returns the index."""
    from minilora.data.shards.questions import write_shards
    from minilora.tasks.vqa.task import prepare

    if wide is not None:
        raise UserError("--wide does not apply to --task vqa; it belongs to --task classify")
    splits, preprocess, tokenizer, limit, tokens = prepare(config)
    made = made_of(config, "split_by") | {"max_length": limit}
    index = write_shards(target, splits.parts, preprocess, tokens, made, shard_mb, config.bad_data)
    tokenizer.save(target)
    return index


if __name__ == "__main__":
    sys.exit(run(main, (UserError, ModelError)))
