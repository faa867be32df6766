"""The house stays in order: who imports whom, nothing but the five dependencies, and a core of an hour's reading."""

import ast
import sys

import pytest

from tests.support.layout import MODULES, PROGRAMS, ROOT, below, circles, imports, of_project

DEPENDENCIES = {"torch", "torchvision", "numpy", "PIL", "safetensors"}
EXTRAS = {"matplotlib", "tqdm"}  # only inside functions, where their absence can be told
CORE = ["minilora/lora.py", "minilora/fused.py", "minilora/inject.py", "minilora/adapter.py"]
READING_PATH = [
    *CORE,
    "reference_models/layers.py",
    "reference_models/vit.py",
    "minilora/training/trainer.py",
    "train.py",
]

# a module or package of minilora: what it may import of the project, besides itself
MAY_IMPORT = {
    "minilora.errors": set(),
    "minilora.speed": set(),
    "minilora.fused": {"minilora.speed", "minilora.speed.gemm"},
    "minilora.lora": {"minilora.fused", "minilora.speed.dropout"},
    "minilora.dora": {"minilora.lora"},
    "minilora.lora_config": {"minilora.errors"},
    "minilora.targets": {"minilora.errors", "minilora.lora_config"},
    "minilora.inject": {
        "minilora.errors",
        "minilora.lora_config",
        "minilora.targets",
        "minilora.dora",
        "minilora.lora",
        "minilora.speed.dropout",
    },
    "minilora.formats": {
        "minilora.errors",
        "minilora.atomic",
        "minilora.lora_config",
        "minilora.targets",
        "minilora.dora",
        "minilora.lora",
        "minilora.inject",
    },
    "minilora.adapter": {
        "minilora.errors",
        "minilora.atomic",
        "minilora.inject",
        "minilora.formats",
        "minilora.formats.checks",
        "minilora.formats.foreign",
        "minilora.formats.peft",
    },
    "minilora.data": {"minilora.errors", "minilora.atomic"},
    "minilora.report": {"minilora.errors", "minilora.adapter", "minilora.atomic", "minilora.inject", "minilora.lora"},
    "minilora.compress": {"minilora.errors", "minilora.inject"},
    "minilora.training": {"minilora.errors", "minilora.adapter", "minilora.atomic", "minilora.inject"},
    "minilora.settings.parse": {"minilora.errors", "minilora.settings.flags", "minilora.settings.values"},
}


def test_reference_models_never_import_minilora():
    for name in MODULES:
        if below(name, "reference_models"):
            assert not [module for module in imports(name) if below(module, "minilora")], name


def test_in_minilora_only_tasks_and_commands_import_reference_models():
    rooms = ("minilora.tasks", "minilora.commands")
    for name in MODULES:
        if below(name, "minilora") and not any(below(name, room) for room in rooms):
            assert not [module for module in imports(name) if below(module, "reference_models")], name


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_lies_below_it(package):
    for name in MODULES:
        if below(name, package):
            others = {module for module in of_project(name) if not below(module, package)}
            assert others <= MAY_IMPORT[package] | {"minilora"}, name


def test_nobody_imports_the_programs_or_the_tests():
    for name in MODULES:
        tops = {module.partition(".")[0] for module in imports(name)}
        assert not tops & {*PROGRAMS, "tests"}, name


def test_there_is_no_circle_of_imports():
    at_top = {name: of_project(name, inside_functions=False) for name in MODULES}
    assert circles(at_top) == []


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
    """The lazy names keep `import minilora` and `python train.py --list-recipes` quick."""
    import subprocess

    code = "import sys, minilora; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
