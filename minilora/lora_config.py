"""LoRAConfig: what to adapt and how, and which values make sense.

The checks are the same whether the values come from code or from somebody's adapter_config.json.
"""

from dataclasses import dataclass, field

from minilora.errors import UserError
from minilora.patterns import BadPattern, fullmatch, is_plain, parse


@dataclass
class LoRAConfig:
    """Names and meanings of the fields are those of PEFT's LoraConfig, plus `train_norms`.

    r, lora_alpha       rank, and the scale s = lora_alpha / r of the update
    use_rslora          s = lora_alpha / sqrt(r) instead, arXiv:2312.03732
    use_dora            learn the lengths of the rows of W apart from their directions: dora.py
    lora_dropout        dropout of x, on the low-rank path only
    target_modules      names of linear layers, each a full dotted name or its end: "q_proj" takes
                        every layer called q_proj, never xq_proj; "vision.q_proj" takes those below
                        `vision`. One string is a regular expression for the whole name;
                        "all-linear" takes every nn.Linear outside the head
    modules_to_save     modules trained in full and stored with the adapter, such as the head
    layers_to_transform numbers of the layers to adapt (the last number in the dotted name); None:
                        all of them
    rank_pattern        {regular expression for the name's end: another r}
    alpha_pattern       {regular expression for the name's end: another lora_alpha}
    bias                "none", "lora_only" (biases of the adapted layers are trained) or "all"
    init_lora_weights   True (B = 0), "gaussian" (B = 0, A normal) or False (B random, for tests)
    train_norms         train weights and biases of all normalisation layers too

    Raises UserError for a value that no layer can have, naming the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    train_norms: bool = False

    def __post_init__(self):
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = (self.layers_to_transform,)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = (self.modules_to_save,)
        for name in ("target_modules", "modules_to_save", "layers_to_transform"):
            # PEFT writes its sets as lists in any order: sorted, one choice always gives one file
            if isinstance(getattr(self, name), (list, set, frozenset)):
                values = getattr(self, name)
                # of several types they cannot be sorted, and are refused below
                same = len({*map(type, values)}) < 2
                setattr(self, name, tuple(sorted(values) if same else values))
        self.modules_to_save = self.modules_to_save or ()
        for name, rule in RULES.items():
            _check(name, getattr(self, name), *rule)
        for name, replaced in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            for key, value in getattr(self, name).items():
                _check(f"{name}[{key!r}]", value, *RULES[replaced])

    def layer_options(self, name: str) -> dict:
        """The arguments of LoRALinear for the layer called `name`, patterns applied."""
        return {
            "r": from_pattern(name, self.rank_pattern, self.r),
            "lora_alpha": from_pattern(name, self.alpha_pattern, self.lora_alpha),
            **{key: getattr(self, key) for key in ("lora_dropout", "use_rslora", "init_lora_weights")},
        }


def from_pattern(name: str, pattern: dict, default):
    """The value of the first key, a regular expression for the end of the name, that fits."""
    starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
    return next((value for key, value in pattern.items() if any(fullmatch(key, name, i) for i in starts)), default)


def _short(value) -> str:
    huge = isinstance(value, (int, float)) and abs(value) > 10**9
    return f"{str(value)[:20] if abs(value) < 10**20 else 'one'}, far too large" if huge else repr(value)[:200]


def _check(name: str, value, holds, wanted: str) -> None:
    try:
        fits, reason = holds(value), ""
    except BadPattern as error:
        fits, reason = False, f" ({error})"
    if not fits:
        raise UserError(f"LoRAConfig: {name} must be {wanted}, got {_short(value)}{reason}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9


def are_names(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_layers(value) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(is_whole(n) and 0 <= n < 10**6 for n in value))


def is_pattern(value) -> bool:
    return isinstance(value, str) and bool(parse(value))


def are_patterns(value) -> bool:
    if isinstance(value, dict) and sum(isinstance(key, str) and not is_plain(key) for key in value) > 64:
        raise BadPattern("more than 64 with operators")
    return isinstance(value, dict) and all(map(is_pattern, value))


SWITCH = (lambda value: isinstance(value, bool), "true or false")
RULES = {
    "r": (lambda value: is_whole(value) and 1 <= value <= 10**9, "a whole number of at least 1"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1"),
    "target_modules": (lambda value: is_pattern(value) or are_names(value), "names or one regular expression"),
    "modules_to_save": (are_names, "names"),
    "layers_to_transform": (are_layers, "numbers of layers"),
    "use_rslora": SWITCH,
    "use_dora": SWITCH,
    "rank_pattern": (are_patterns, "{regular expression: rank}"),
    "alpha_pattern": (are_patterns, "{regular expression: alpha}"),
    "bias": (("none", "lora_only", "all").__contains__, "one of none, lora_only, all"),
    "init_lora_weights": ((True, False, "gaussian").__contains__, "one of True, False, gaussian"),
}
