"""The configuration: where a value comes from, what is refused and with which words, and config.toml there and back."""

import shlex
import tomllib
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import UserError
from minilora.settings.flags import Config, rules
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import check, parse_args, read_recipe, read_toml, recipes, to_toml, train_parser
from minilora.settings.values import convert
from tests.support.cli_data import program


def parsed(*words: str) -> Config:
    return parse_args(list(words))[0]


def test_no_flag_gives_the_defaults():
    assert parsed() == Config()


def test_flags_win_over_config_over_recipe_over_defaults(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('recipe = "imagewoof-vit-tiny"\nlr = 0.5\nepochs = 7\n')
    config = parsed("--config", str(file), "--lr", "0.25")
    assert (config.lr, config.epochs, config.batch_size, config.smoothing) == (0.25, 7, 128, 0.0)


def test_every_recipe_is_valid_and_says_what_it_is():
    for name, text in recipes().items():
        check(Config(**read_recipe(name)))
        assert len(text) > 20


def test_the_imagewoof_recipe_has_the_published_hyperparameters():
    config = Config(**read_recipe("imagewoof-vit-tiny"))
    assert (config.lora_r, config.lora_alpha, config.lr, config.batch_size, config.opt) == (4, 4, 4e-4, 128, "adam")
    assert config.train_norms and len(config.target_modules) == 6


def test_towers_take_one_value_or_one_each():
    assert parsed("--lora-r", "4").lora_r == 4
    assert parsed("--lora-r", "vision=4", "text=8").lora_r == {"vision": 4, "text": 8}
    config = parsed("--task", "vqa", "--model", "vision=vit-base-patch16-224", "text=bert-base")
    assert config.model == {"vision": "vit-base-patch16-224", "text": "bert-base"}


def test_lists_take_spaces_commas_and_patterns():
    assert parsed("--target-modules", "q_proj,k_proj", "fc1").target_modules == ("q_proj", "k_proj", "fc1")
    assert parsed("--target-modules", "all-linear").target_modules == "all-linear"
    assert parsed("--target-modules", r".*\.q_proj").target_modules == r".*\.q_proj"
    assert parsed("--layers", "0,2", "8-11").layers == (0, 2, 8, 9, 10, 11)


def test_a_switch_of_the_recipe_can_be_switched_off():
    assert parsed("--recipe", "imagewoof-vit-tiny").train_norms
    assert not parsed("--recipe", "imagewoof-vit-tiny", "--no-train-norms").train_norms


@pytest.mark.parametrize(
    "words, told",
    [
        ("--lora-rr 3", "did you mean --lora-r?"),
        ("--task clasify", "did you mean classify?"),
        ("--task VQA", "did you mean vqa?"),
        ("--opt AdamW", "did you mean adamw?"),
        ("--augment randaugment", "did you mean rand?"),
        ("--lora_r 4", "did you mean --lora-r?"),
        ("--learning-rate 1", "did you mean --lr?"),
        ("--rank 4", "did you mean --lora-r?"),
        ("--gpu", "did you mean --device?"),
        ("--output-dir x", "did you mean --output?"),
        ("--lora-r 0", "--lora-r must be a whole number from 1 to 65536, got '0'"),
        ("--lora-r -4", "--lora-r must be a whole number from 1 to 65536, got '-4'"),
        ("--seed -1", "from 0 to 2147483648"),
        ("tests", "belongs to no flag; data go with --data-dir, a run with --resume"),
        ("--sched step", "one of linear, cosine, plateau, constant"),
        ("--lr 0", "--lr must be a number above 0"),
        ("--lr nan", "--lr must be a number"),
        ("--epochs 1.5", "--epochs must be a whole number at least 1"),
        ("--lora-dropout 1", "at least 0 and below 1"),
        ("--lora-r vision=4 4", "one value, or vision=A text=B"),
        ("--lora-r audio=4", "no tower 'audio'"),
        ("--layers 5-3", "block numbers"),
        ("--target-modules ,", "at least one name"),
        ("--epochs", "--epochs needs a value"),
        ("stray", "belongs to no flag"),
        ("--subset 2.6", "--subset 2.6 is above 1 and so a number of pictures, which must be whole"),
        ("--num-answers 10", "does not apply to --task classify; it belongs to --task vqa"),
        ("--task vqa --prompt {question}{choice}", "it belongs to --task classify and --task choice"),
        ("--task choice --prompt Hello", "must contain {question} and {choice}"),
        ("--mode linear --lora-r 4", "no effect with --mode linear"),
        ("--mode linear --head-lr 1", "--lr is the head's learning rate"),
        ("--cache-features", "changes the encoder in every step"),
        ("--mode linear --cache-features --augment rand", "changes it in every epoch"),
        ("--distill-alpha 0.5", "needs --teacher"),
        ("--base-dtype bf16 --amp fp32", "needs --amp bf16"),
        ("--base-dtype bf16 --mode full", "frozen weights"),
        ("--device gpu", "auto, cpu, cuda or cuda:N"),
        ("--recipe imagewoof", "there are"),
        ("--config /nonexistent.toml", "/nonexistent.toml: cannot be read"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(words, told):
    with pytest.raises(UserError) as error:
        parsed(*words.split())
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_empty_text_is_no_value():
    """`--data-dir "$DATA"` with DATA not set would else mean the folder one stands in."""
    with pytest.raises(UserError, match="--data-dir needs a value, got an empty text"):
        parsed("--data-dir", "")


@pytest.mark.parametrize(
    "text, told",
    [
        ("lora_rank = 4", "unknown key 'lora_rank'; did you mean lora_r?"),
        ('lr = "fast"', "lr must be a number"),
        ("epochs = true", "epochs must be a whole number"),
        ("compile = 1", "compile must be true or false"),
        ("lr = [1]", "lr must be a number"),
        ('target_modules = [["q_proj"]]', "takes names"),
        ("lora_r = {vision = 4, sound = 2}", "no tower 'sound'"),
        ("lr = ", "not a TOML file"),
    ],
)
def test_a_toml_mistake_names_file_and_key(tmp_path, text, told):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_toml(file)
    assert told in str(error.value) and "bad.toml" in str(error.value)


def test_config_toml_gives_the_configuration_back(tmp_path):
    words = "--lora-r vision=4 text=8 --layers 0-3 --target-modules vision.q_proj text.v_proj --task vqa --lr 3e-4"
    words += " --fusion concat-product --text-pooling mean"  # as a run has them, resolved
    config = parsed(*words.split(), "--data-dir", 'odd "name" \\ and ü\x7f\n')
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config, {"weights": "x", "sha256": "00"}), encoding="utf-8")
    assert Config(**read_toml(file)) == config
    assert tomllib.loads(file.read_text(encoding="utf-8"))["base"] == {"weights": "x", "sha256": "00"}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.floats(min_value=1e-12, max_value=1e12), st.integers(1, 2**31))
def test_any_text_and_number_survives_toml(text, number, whole):
    config = Config(data_dir=text, lr=number, epochs=whole)
    values = tomllib.loads(to_toml(config))
    assert (values["data_dir"], values["lr"], values["epochs"]) == (text, number, whole)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(rules(Config))), st.one_of(st.text(), st.integers(), st.floats(), st.booleans(),
       st.lists(st.text(max_size=3), max_size=3), st.dictionaries(st.text(max_size=6), st.integers())))  # fmt: skip
def test_no_value_of_any_type_breaks_a_flag(name, value):
    try:
        convert(name, rules(Config)[name], value)
    except UserError as error:
        assert name.replace("_", "-") in str(error)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_toml_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("toml") / "x.toml"
    file.write_bytes(content)
    try:
        read_toml(file)
    except UserError:
        pass


@pytest.mark.parametrize("name, table", [("train", Config), ("evaluate", EvalConfig)])
def test_help_fits_100_columns_names_every_flag_and_ends_with_examples(name, table, capsys):
    with pytest.raises(SystemExit):
        program(name).main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for f in fields(table):
        assert f"--{f.name.replace('_', '-')}" in text
    assert text.rpartition("examples:\n")[2].count(f"  python {name}.py ") >= 4


def test_examples_of_the_help_are_commands_that_are_understood():
    lines = train_parser().format_help().rpartition("examples:\n")[2].splitlines()
    for line in lines:
        parse_args(shlex.split(line)[2:])


def test_the_help_shows_the_defaults_in_brackets():
    text = train_parser().format_help()
    assert "[8]" in text and "[q_proj v_proj;" in text and "lora 0.00" in text


def test_tables_have_a_help_of_one_line_for_every_flag():
    for table in (Config, EvalConfig):
        for name, rule in rules(table).items():
            assert 3 < len(rule.help) < 75, name
