"""The house stays in order: who imports whom, nothing but the five dependencies, and a core of an hour's reading."""

import ast
import re
import subprocess
import sys

import pytest

from tests.support.layout import LAZY, MODULES, PROGRAMS, ROOT, below, circles, import_graph, imports, of_project

DEPENDENCIES = {"torch", "torchvision", "numpy", "PIL", "safetensors"}
EXTRAS = {"matplotlib", "tqdm"}  # only inside functions, where their absence can be told
CORE = ["minilora/lora.py", "minilora/fused.py", "minilora/inject.py", "minilora/adapter.py"]
READING_PATH = [
    *CORE,
    "reference_models/layers.py",
    "reference_models/vit.py",
    "minilora/lessons/loop.py",
    "minilora/tasks/method.py",
    "minilora/training/trainer.py",
    "train.py",
]

GROUND = {f"minilora.{name}" for name in ("errors", "atomic", "signals", "textfiles", "ticker", "version")}
CORE_ROOMS = {"minilora.speed", "minilora.lora", "minilora.lora_config", "minilora.targets", "minilora.inject"}
BELOW_TASKS = {"adapter", "compress", "data", "report", "settings", "training"}
# every room of the house: what it may import of the project, besides itself
MAY_IMPORT = {
    "minilora.errors": set(),
    "minilora.version": set(),
    "minilora.signals": set(),
    "minilora.textfiles": {"minilora.errors"},
    "minilora.ticker": {"minilora.errors", "minilora.textfiles"},
    "minilora.atomic": {"minilora.errors"},
    "minilora.speed": set(),
    "minilora.fused": {"minilora.speed"},
    "minilora.lora": {"minilora.fused", "minilora.speed", "minilora.errors"},
    "minilora.dora": {"minilora.lora", "minilora.speed"},
    "minilora.patterns": set(),
    "minilora.lora_config": {"minilora.errors", "minilora.patterns"},
    "minilora.targets": {"minilora.errors", "minilora.lora_config", "minilora.patterns"},
    "minilora.inject": GROUND | CORE_ROOMS | {"minilora.dora"},
    "minilora.formats": GROUND | CORE_ROOMS | {"minilora.dora"},
    "minilora.adapter": GROUND | CORE_ROOMS | {"minilora.formats"},
    "minilora.settings": GROUND,
    "minilora.data": GROUND,
    "minilora.compress": GROUND | CORE_ROOMS,
    "minilora.report": GROUND | CORE_ROOMS,
    "minilora.training": GROUND | CORE_ROOMS | {"minilora.adapter"},
    "minilora.tasks": GROUND | CORE_ROOMS | {f"minilora.{room}" for room in BELOW_TASKS} | {"reference_models"},
    "minilora.commands": GROUND
    | CORE_ROOMS
    | {f"minilora.{room}" for room in BELOW_TASKS}
    | {"minilora.tasks", "reference_models"},
    "minilora.lessons": GROUND | CORE_ROOMS | {"minilora.adapter", "minilora.data.generated", "reference_models"},
    "reference_models.errors": set(),
    "reference_models.layers": {f"reference_models.{name}" for name in ("errors", "activations", "processor")},
    "reference_models.text": {"reference_models.errors"},
}
STUBS = {"minilora.pretrain", "minilora.data.download", "minilora.tasks.backbones", "reference_models.names"}


def test_reference_models_never_import_minilora():
    for name in MODULES:
        if below(name, "reference_models"):
            assert not [module for module in imports(name) if below(module, "minilora")], name


def test_in_minilora_only_tasks_commands_and_lessons_import_reference_models():
    rooms = ("minilora.tasks", "minilora.commands", "minilora.lessons")
    for name in MODULES:
        if below(name, "minilora") and not any(below(name, room) for room in rooms):
            assert not [module for module in imports(name) if below(module, "reference_models")], name


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_lies_below_it(package):
    for name in MODULES:
        if below(name, package) and name not in LAZY:
            others = {module for module in of_project(name) if not below(module, package)}
            above = [m for m in others if m not in LAZY and not any(below(m, room) for room in MAY_IMPORT[package])]
            assert not above, name


def test_every_room_of_minilora_has_its_arrows():
    rooms = {".".join(name.split(".")[:2]) for name in MODULES if below(name, "minilora") and name not in STUBS}
    assert rooms - {"minilora"} <= MAY_IMPORT.keys()


def test_no_model_imports_the_files_that_it_is_loaded_from():
    above = ("reference_models.files", "reference_models.load", "reference_models.text")
    for name in MODULES:
        if below(name, "reference_models") and name not in (*LAZY, *above) and not below(name, above[0]):
            met = {module for module in of_project(name) for room in above if below(module, room)}
            assert not met or below(name, "reference_models.text"), f"{name}: {met}"


@pytest.mark.parametrize("old", sorted(STUBS | {"minilora.data.shards", "minilora.lora"}))
def test_an_old_command_names_the_new_one_and_exits_with_2(old):
    done = subprocess.run([sys.executable, "-m", old], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert re.search(r"now: python -m (minilora\.(?:commands|lessons)\.\w+)", line)[1] in MODULES


def test_nobody_imports_the_programs_or_the_tests():
    for name in MODULES:
        tops = {module.partition(".")[0] for module in imports(name)}
        assert not tops & {*PROGRAMS, "tests"}, name


def test_there_is_no_circle_of_imports():
    """Imports inside functions, under __main__ and by importlib count; `python -m tests.support.layout` lists them."""
    assert circles(import_graph()) == []


def test_circles_are_found_where_there_are_some():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d2"}, "d2": {"d"}, "e": set()}
    assert circles(graph) == [["b", "c"], ["d", "d2"]]


def test_only_the_five_dependencies_and_the_standard_library():
    known = DEPENDENCIES | {"minilora", "reference_models", "setuptools"} | set(sys.stdlib_module_names)
    for name in MODULES:
        at_top = {module.partition(".")[0] for module in imports(name, inside_functions=False)}
        anywhere = {module.partition(".")[0] for module in imports(name)}
        assert at_top <= known, name
        assert anywhere <= known | EXTRAS, name


def lines(file: str) -> int:
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def test_the_core_is_at_most_600_lines_and_the_reading_path_1600():
    assert sum(map(lines, CORE)) <= 600
    assert sum(map(lines, READING_PATH)) <= 1600


def test_files_are_short_enough_to_read():
    long = {str(f.relative_to(ROOT)): n for f in MODULES.values() if (n := lines(str(f.relative_to(ROOT)))) > 350}
    assert not long


def test_every_module_says_what_it_is():
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if len(tree.body) > 1:
            assert ast.get_docstring(tree), name


def test_public_names_are_found_where_the_package_says():
    import minilora

    for name in minilora.__all__:
        assert getattr(minilora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'inject_loar'"):
        minilora.inject_loar  # noqa: B018


def test_importing_minilora_imports_no_torch():
    """The names are lazy: who wants one of them does not wait for all."""
    code = "import sys, minilora; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "words, rc, told",
    [
        ("train.py --help", 0, "usage: train.py"),
        ("train.py --lr abc", 2, "error: --lr must be a number above 0, got 'abc'"),
        ("evaluate.py --help", 0, "usage: evaluate.py RUN"),
        ("evaluate.py RUN --imag x", 2, "did you mean --image?"),
    ],
)
def test_help_and_mistyped_flags_are_answered_before_torch_is_loaded(words, rc, told):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert (done.returncode, imported & {"torch", "numpy", "PIL"}) == (rc, set())
    assert "minilora.settings.parse" in imported and told in done.stdout + done.stderr


def test_torchvision_is_loaded_once_it_augments_and_not_before():
    """It loads torch's compiler, which takes a second of every start."""
    code = """
import sys, train, evaluate, minilora.commands.demo
from PIL import Image
from minilora.data.pictures.transforms import build_transform
from reference_models import load_pretrained
model = load_pretrained("vit-nano-patch8-48")
model(build_transform(model.preprocess)(Image.new("RGB", (60, 50)))[None])
early = "torchvision" in sys.modules
build_transform(model.preprocess, "rand")
print(early, "torchvision" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
