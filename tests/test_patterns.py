"""Regular expressions from files: the answers of re, in bounded time."""

import random
import re
import time

import pytest

from minilora.errors import UserError
from minilora.lora_config import LoRAConfig
from minilora.patterns import BadPattern, fullmatch

ATOMS = "a b . [ab] [^a] \\d \\. (a|b) (?:ab) (?=a) (?!b) (?<=a) (?<!b) ^ $ \\b (a*) x{2} { [a\\]] (?!.*b)".split()
COUNTS = ["", "", "", "*", "+", "?", "{1,2}", "{0,3}", "{2,}", "*?"]


def test_random_patterns_fit_the_texts_that_re_finds_fitting():
    rng, compared, fitting = random.Random(0), 0, 0
    while compared < 6000:
        pattern = "".join(rng.choice(ATOMS) + rng.choice(COUNTS) + rng.choice(["", "", "|"]) for _ in range(4))
        text = "".join(rng.choice("ab.1x{]") for _ in range(rng.randrange(7)))
        start = min(1, len(text))
        try:
            wanted = bool(re.compile(pattern).fullmatch(text, start))
            found = fullmatch(pattern, text, start)
        except (re.error, BadPattern):  # x{2}+ is possessive, which is not known here
            continue
        assert found == wanted, (pattern, text)
        compared, fitting = compared + 1, fitting + found
    assert fitting > 500


def test_real_patterns_of_adapters_choose_as_re_does():
    names = ["model.visual.blocks.3.attn.qkv", "model.layers.11.self_attn.q_proj", "vit.blocks.1.mlp.fc1", "lm_head"]
    for pattern in (
        r"^(?!.*visual).*(?:q_proj|k_proj|fc1).*", r".*\.layers\.(1[01]|\d)\.self_attn\.(q|v)_proj$", r".*mlp\.fc[12]",
        r"(?<!lm_)head|.*blocks\.[0-3]\..*", r"model\.(?=layers).*",
    ):  # fmt: skip
        assert [fullmatch(pattern, name) for name in names] == [bool(re.fullmatch(pattern, name)) for name in names]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z0-9_]+)+\.?)+!",
        "(a|a)*b",
        "(.*)*!",
        ".*" * 12 + "!",
        "((((a*)*)*)*)*b",
        "(a?){40}a{40}!",
        "(a|aa|aaa)+$!",
    ],
)
def test_a_pattern_that_would_keep_re_for_years_is_answered_at_once(pattern):
    before = time.process_time()
    assert not fullmatch(pattern, "a" * 60)
    assert time.process_time() - before < 20  # of re's years; a machine under load is given its time


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(" * 900 + "a" + ")" * 900, "nested|recursion"), ("a|" * 2000, "longer than"), (r"(a)\1", "not supported"),
        ("(?i)a", "not supported"), ("(a", "missing"), ("a*+", "not supported"), ("(?P<x>a)(?P=x)", "not supported"),
    ],
)  # fmt: skip
def test_a_pattern_that_cannot_be_bounded_is_refused_by_name(pattern, reason):
    for options in ({"target_modules": pattern}, {"rank_pattern": {pattern: 3}}, {"alpha_pattern": {pattern: 3}}):
        with pytest.raises(UserError, match=rf"(target_modules|rank_pattern|alpha_pattern) must be .*\(.*({reason})"):
            LoRAConfig(**options)


def test_a_rank_pattern_means_the_end_of_a_name_and_anchors_its_beginning():
    config = LoRAConfig(rank_pattern={r"^blocks\.0\..*": 2, r"q_pro.": 3, r"(k|v)_proj": 4})
    ranks = {"blocks.0.q_proj": 2, "x.blocks.0.q_proj": 3, "a.q_proj": 3, "a.xq_proj": 8, "v_proj": 4, "b.k_proj": 4}
    assert {name: config.layer_options(name)["r"] for name in ranks} == ranks
    with pytest.raises(UserError, match="more than 64 with operators"):
        LoRAConfig(rank_pattern={f"a{i}.*": 1 for i in range(65)})
    assert LoRAConfig(rank_pattern={f"blocks.{i}.q": 1 for i in range(900)}).layer_options("blocks.7.q")["r"] == 1
