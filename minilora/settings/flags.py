"""The flags of train.py: one dataclass field per flag, with its group, default and help.

`--lora-r` is `config.lora_r`. values.py reads and checks a value by its rule, parse.py turns a
command line or a TOML file into a Config. The flags of evaluate.py are in flags_evaluate.py.
"""

from dataclasses import dataclass, field, fields
from os.path import basename, isabs
from typing import Any, ClassVar

TASKS = ("classify", "vqa", "choice")
TEXT = ("vqa", "choice")  # the tasks that read text beside pictures
FORMATS = ("auto", "folder", "csv", "vqa2", "visual7w", "scpc", "shapes", "shards")
MODES = ("lora", "full", "linear")
AMP = ("auto", "fp32", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "plateau", "constant")
HEADS = ("names", "linear")
PICTURE_FLAGS = ("mean", "std", "interpolation", "resize", "crop_pct")
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
METRICS = ("accuracy", "balanced", "f1", "map", "loss")
BIASES = ("none", "lora_only", "all")
LAYOUTS = ("minilora", "transformers", "transformers5", "transformers4", "timm", "open_clip", "torchvision")
DEFAULT_LR = {"lora": 2e-3, "full": 3e-4, "linear": 1e-2}  # where --lr is not given, by --mode
DEFAULT_TARGETS = {task: ("q_proj", "v_proj") for task in TASKS} | {"choice": ("q_proj", "v_proj", "out_proj")}
NANO_CLIP_LR = 4e-3  # of LoRA on clip-nano; larger models want the usual rates
LR_BY_MODE = ", ".join(f"{mode} {lr:g}" for mode, lr in DEFAULT_LR.items()) + f"; choice, clip-nano {NANO_CLIP_LR:g}"


@dataclass(frozen=True)
class Rule:
    """How a flag reads and what it accepts.

    kind: str, int, float or bool (a bool takes no value; `--no-NAME` switches it off again).
    choices: accepted words; low, high: closed range; above, below: open range.
    many: several values, between spaces or commas. towers: one value for all, or `vision=A text=B`.
    tasks: where the flag means something. meta: the value's name in --help.
    shown: its default, in words.
    """

    group: str
    help: str
    kind: type = str
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    many: bool = False
    towers: bool = False
    tasks: tuple = TASKS
    meta: str | None = None
    shown: str | None = None


def flag(group: str, default: Any, help: str, kind: type = str, **rule: Any) -> Any:
    """A dataclass field that is also a flag."""
    return field(default=default, metadata={"rule": Rule(group, help, kind, **rule)})


def flags_of(table: type, *names: str) -> list[tuple]:
    """Some flags of a table, for make_dataclass."""
    return [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in fields(table) if f.name in names]


def rules(table: type) -> dict[str, Rule]:
    """{field name: rule} of a table of flags."""
    return {f.name: f.metadata["rule"] for f in fields(table)}


W, M, O, I, S, C, R = "what", "method", "optimiser", "input", "speed", "compression", "run"
T = "text: questions, choices, class names"


# fmt: off
@dataclass
class Config:
    """Everything that one can ask of train.py. A run directory's config.toml holds these fields."""

    # flags that were typed or stood in a file, whatever their value; parse.parse_args sets it
    given: ClassVar[frozenset[str] | None] = None
    # limits that `--resume RUN` raises; rundir.continued sets it
    longer: ClassVar[tuple[str, ...]] = ()
    # heads that --adapter lacks; method.make_trainable sets it
    new_heads: ClassVar[tuple[str, ...]] = ()

    @property
    def model_name(self) -> str:
        """The model or the two towers in words; of a folder its name alone."""
        towers = self.model.values() if isinstance(self.model, dict) else [self.model]
        return " + ".join(basename(tower.rstrip("/")) if isabs(tower) else tower for tower in map(str, towers))

    task: str = flag(W, "classify", "what to learn", choices=TASKS)
    recipe: str = flag(W, None, "a named set of flags, see --list-recipes", meta="NAME")
    config: str = flag(W, None, "flags from a TOML file or a run; they win over the recipe's", meta="FILE")
    model: Any = flag(W, None, "see --list-models", towers=True, meta="NAME", shown="a bundled nano model")
    weights: Any = flag(W, None, "file, folder, hf:org/name, or none (random)", towers=True, meta="PATH",
        shown="bundled")
    tokenizer: str = flag(W, None, "vocabulary; classify: of the class names", meta="PATH",
        shown="what lies beside the weights")
    adapter: str = flag(W, None, "start from this adapter: a run's, or one of PEFT's", meta="DIR")
    data_dir: str = flag(W, None, "the data set: folder or table", meta="DIR", shown="generated shapes")
    data_format: str = flag(W, "auto", "how the data lies on the disk", choices=FORMATS)
    multi_label: bool = flag(W, False, "any number of labels for each picture, from a table", bool, tasks=("classify",))
    output: str = flag(W, None, "run directory", meta="DIR", shown="runs/TASK-MODE-NNN")
    dry_run: bool = flag(W, False, "say what would be trained, on what, for how long; train nothing", bool)

    mode: str = flag(M, "lora", "train adapters and head, everything, or the head alone", choices=MODES)
    head: str = flag(M, None, "class names as sentences, or a new linear layer", choices=HEADS, tasks=("classify",),
        shown="names for a CLIP, else linear")
    lora_r: Any = flag(M, 8, "rank of the update", int, low=1, high=65536, towers=True)
    lora_alpha: Any = flag(M, 16.0, "the update is scaled by alpha / r", float, above=0, towers=True)
    lora_dropout: float = flag(M, 0.0, "dropout of the update's input", float, low=0, below=1)
    target_modules: Any = flag(M, None, "layers to adapt, see --list-targets; or all-linear", many=True,
        shown="q_proj v_proj; choice: out_proj too")
    layers: Any = flag(M, None, "blocks to adapt, such as 0 1 or 8-11", many=True, meta="N", shown="all")
    train_norms: bool = flag(M, False, "train the normalisation layers too", bool)
    train_bias: str = flag(M, "none", "train biases: of the adapted layers, or all", choices=BIASES)
    use_rslora: bool = flag(M, False, "scale by alpha / sqrt(r)", bool)
    use_dora: bool = flag(M, False, "learn magnitude and direction apart (DoRA)", bool)

    epochs: int = flag(O, 8, "passes over the training data", int, low=1)
    max_steps: int = flag(O, 0, "end after N optimizer steps; 0: never", int, low=0)
    steps_per_shot: int = flag(O, 0, "with --shots K: K * N steps, shared out among the epochs", int, low=0,
        tasks=("classify",))
    batch_size: int = flag(O, 32, "pictures or questions at once", int, low=1)
    grad_accum_steps: int = flag(O, 1, "batches per optimizer step", int, low=1)
    opt: str = flag(O, "adamw", "optimizer", choices=("adamw", "adam", "sgd"))
    lr: float = flag(O, None, "learning rate", float, above=0, shown=LR_BY_MODE)
    head_lr: float = flag(O, None, "learning rate of the head", float, above=0, shown="as --lr")
    lora_plus: float = flag(O, None, "the learning rate of B is this times that of A (LoRA+)", float, above=0,
        meta="RATIO", shown="1")
    weight_decay: float = flag(O, 0.01, "shrinks matrices, never biases and norms", float, low=0)
    sched: str = flag(O, "cosine", "course of the learning rate", choices=SCHEDULES)
    warmup_ratio: float = flag(O, 0.05, "share of the steps in which the rate rises", float, low=0, below=1)
    clip_grad: float = flag(O, 0.0, "largest norm of the gradient; 0: no limit", float, low=0)
    smoothing: float = flag(O, 0.0, "label smoothing", float, low=0, below=1)
    class_weights: str = flag(O, "none", "auto: a class counts by 1 / its training pictures, on average 1",
        choices=("none", "auto"), tasks=("classify",))

    image_size: int = flag(I, None, "side in pixels", int, low=8, high=2048, shown="as the model was trained")
    mean: Any = flag(I, None, "of the three colours, in 0..1", float, many=True, low=-1000, high=1000, meta="X",
        shown="the checkpoint's")
    std: Any = flag(I, None, "deviation of the three colours", float, many=True, above=0, high=1000, meta="X",
        shown="the checkpoint's")
    interpolation: str = flag(I, None, "filter for resizing", choices=FILTERS, shown="the checkpoint's")
    resize: str = flag(I, None, "to the square: squash it, or crop what is longer", choices=("squash", "crop"),
        shown="the checkpoint's; crop beside --crop-pct")
    crop_pct: float = flag(I, None, "share of the resized picture whose middle is taken", float, above=0, high=1,
        shown="the checkpoint's; 1 beside --resize")
    augment: str = flag(I, "none", "basic: random crop and flip; rand: RandAugment too", choices=("none",
        "basic", "rand"))
    val_split: float = flag(I, 0.1, "share of train held out where there is no val/", float, above=0, below=1)
    split_by: str = flag(I, "image", "what --val-split holds out: pictures with their questions, or questions",
        choices=("image", "question"), tasks=("vqa",))
    subset: float = flag(I, 1.0, "train on a share, or (above 1) on a number of pictures", float, above=0)
    shots: int = flag(I, None, "train on K pictures of each class, drawn by the seed", int, low=1, meta="K",
        tasks=("classify",), shown="all")
    seed: int = flag(I, 0, "for data order, augmentation, new weights, dropout", int, low=0, high=2**31)
    workers: int = flag(I, None, "processes that read pictures", int, low=0, high=64,
        shown="0; beside a GPU one per core, at most 16")
    bad_data: str = flag(I, "error", "a broken picture ends the run, or is left out", choices=("error", "skip"))

    num_answers: int = flag(T, 1000, "vqa: classes are the K most frequent answers", int, low=2, tasks=("vqa",))
    fusion: str = flag(T, None, "vqa: how picture and question meet", tasks=("vqa",),
        choices=("concat", "product", "concat-product"), shown="concat-product; product for a student")
    text_pooling: str = flag(T, None, "two towers: which vector a text has; auto: as its folder says",
        choices=("auto", "pooler", "mean", "cls", "max"), shown="auto")
    max_length: int = flag(T, None, "longest text in tokens", int, low=4, tasks=TEXT, shown="the model's")
    group_by_image: bool = flag(T, False, "vqa: questions of one picture share a batch and its encoding", bool,
        tasks=("vqa",))
    soft_targets: bool = flag(T, False, "vqa: learn from all ten people's answers, one by one", bool, tasks=("vqa",))
    prompt: Any = flag(T, None, "how a choice or class becomes a sentence; for classes several", many=True,
        tasks=("classify", "choice"), meta="TEXT",
        shown="Question: {question} Answer: {choice}, or: a photo of a {}.")

    amp: str = flag(S, "auto", "precision; auto: bf16 where it is fast, else fp16 on a GPU, fp32 on a CPU", choices=AMP)
    base_dtype: str = flag(S, None, "how frozen weights are stored", choices=AMP[1:], shown="as --amp; DoRA: fp32")
    compile: bool = flag(S, False, "torch.compile the model, block by block", bool)
    deterministic: bool = flag(S, False, "on a GPU: a resumed run has the same bits, as on a CPU; slower", bool)
    grad_checkpointing: bool = flag(S, False, "less memory for one more forward pass", bool)
    device: str = flag(S, "auto", "auto, cpu, cuda or cuda:N", meta="NAME")
    threads: int = flag(S, None, "CPU threads; the same bits need the same number", int, low=1, high=1024,
        shown="OMP_NUM_THREADS, or the cores there are")
    cache_features: bool = flag(S, False, "encode every picture once, before training; linear mode", bool)

    teacher: str = flag(C, None, "run directory of the model to learn from", meta="RUN")
    distill_alpha: float = flag(C, 0.9, "share of the labels in the loss; the rest is the teacher's", float,
        low=0, high=1)
    distill_temperature: float = flag(C, 15.0, "softens both distributions", float, above=0)
    distill_t2: bool = flag(C, False, "multiply the teacher's share by the temperature squared", bool)
    distill_hard: bool = flag(C, False, "learn the teacher's best answer alone, not how sure it is", bool)
    distill_unlabelled: str = flag(C, None, "more pictures or questions, which only the teacher answers", meta="DIR",
        tasks=("classify", "vqa"))
    unlabelled_share: float = flag(C, 0.75, "share of these in a batch; an epoch is one pass over them", float,
        above=0, below=1, tasks=("classify", "vqa"))

    resume: str = flag(R, "auto", "auto: resume --output; never: start anew; or the run to resume",
        meta="auto|never|DIR")
    seeds: Any = flag(R, None, "a run for each seed, one after the other; then mean and spread", int, many=True,
        low=0, high=2**31, meta="N", shown="--seed alone")
    save_every: int = flag(R, 0, "steps between checkpoints; 0: one per epoch", int, low=0)
    keep_checkpoints: int = flag(R, 2, "how many of the newest stay, for --resume", int, low=1, meta="K")
    metric: str = flag(R, None, "what is best in the epoch whose weights the run keeps",
        choices=METRICS, shown="accuracy; with --multi-label map")
    time_limit: float = flag(R, None, "minutes after which training ends, to be resumed", float, above=0,
        meta="MINUTES", shown="none")
    early_stop: int = flag(R, 0, "end after N epochs without a better one; 0: never", int, low=0)
    log_interval: int = flag(R, 10, "steps between lines of the log", int, low=1)
    log_to: str = flag(R, "none", "tensorboard: event files in the run directory too", choices=("none", "tensorboard"))
    nan_policy: str = flag(R, "stop", "a loss that is no number ends the run, or the step", choices=("stop", "skip"))
# fmt: on
