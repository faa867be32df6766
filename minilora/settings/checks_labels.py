"""Which flags of train.py go with --multi-label, --metric and --seeds; parse.check asks here."""

import os
from collections.abc import Collection

from minilora.errors import UserError
from minilora.settings.flags import Config


def check_labels(config: Config, given: Collection[str]) -> None:
    """UserError for flags that contradict each other; `given` are those that were given."""
    metric, resume, several, seeds = config.metric, config.resume, config.multi_label, config.seeds
    of_one_class = {"--metric balanced": metric == "balanced", "--class-weights auto": config.class_weights == "auto"}
    of_one_class |= {"--head names": config.head == "names", "--shots": config.shots, "--teacher": config.teacher}
    if several and (flags := [flag for flag, on in of_one_class.items() if on]):
        raise UserError(f"{flags[0]} reckons with one class for each picture; leave it out beside --multi-label")
    if config.task != "classify" and metric not in (None, "accuracy", "loss"):
        raise UserError(f"--metric {metric} does not apply to --task {config.task}; use accuracy or loss")
    if metric == "map" and not several:
        raise UserError("--metric map is the mean average precision of --multi-label; use accuracy, balanced, f1, loss")
    if seeds and "seed" in given:
        raise UserError("--seed and --seeds both name the seed; use one of the two")
    if seeds and resume != "auto":
        raise UserError(f"--resume {resume} is for one run; --seeds beside the same --output resumes what is left")
    if seeds and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds starts runs of its own; with torchrun start one for each --seed")
