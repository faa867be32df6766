"""Commands: what one types besides train.py and evaluate.py, and what those two print.

    python -m minilora.commands.download imagewoof DIR    the public data sets of the recipes
    python -m minilora.commands.shards SRC DST ...        pictures and questions prepared once
    python -m minilora.commands.backbones ...             a table of encoders, trained side by side
    python -m minilora.commands.shots ...                 a table over few pictures of each class
    python -m minilora.commands.pretrain NAME             the bundled nano weights, made anew
    python -m minilora.commands.rename_adapter SRC DST    between the names of transformers 4 and 5

What train.py and evaluate.py show: listing (--list-models ...), dryrun (--dry-run), results (the
lines and files that a run leaves), compression (--prune, --latency).
"""
