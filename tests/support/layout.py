"""The files that are shipped, what each imports, and the circles among them. Nothing is run: the source is read."""

import ast
import os
import re
from pathlib import Path

ROOT = Path(os.environ.get("MINILORA_ROOT", Path(__file__).parents[2]))  # another checkout can be looked at
PROGRAMS = ("train", "evaluate")
# the tables by which names are looked up at their first use: the only arrows that may point upwards
LAZY = ("minilora", "reference_models", "minilora.tasks")


def modules() -> dict[str, Path]:
    """{dotted name: file} of everything that is shipped."""
    files = [path for package in ("minilora", "reference_models") for path in (ROOT / package).rglob("*.py")]
    files += [ROOT / f"{name}.py" for name in PROGRAMS]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()


def imports(name: str, inside_functions: bool = True) -> set[str]:
    """Dotted names that a module imports, `from a import b` as a.b where that is a module.

    Imports inside functions, under `if __name__ == "__main__"` and names given to importlib count.
    A name put together at run time (f"reference_models.files.{family}") stands for all that fit it.
    """
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found, nodes = set(), list(ast.walk(tree))
    if not inside_functions:
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        hidden = {id(node) for function in functions for node in ast.walk(function)}
        nodes = [node for node in nodes if id(node) not in hidden]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= named_at_run_time(node.args[0])
    return found


def named_at_run_time(node: ast.expr) -> set[str]:
    """The modules that the argument of importlib.import_module can mean."""
    if isinstance(node, ast.Constant):
        return {node.value}
    assert isinstance(node, ast.JoinedStr), f"line {node.lineno}: name the module as a text or an f-string"
    parts = [re.escape(part.value) if isinstance(part, ast.Constant) else r"[\w.]+" for part in node.values]
    return {module for module in MODULES if re.fullmatch("".join(parts), module)}


def of_project(name: str, inside_functions: bool = True) -> set[str]:
    return {module for module in imports(name, inside_functions) if module in MODULES and module != name}


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected groups of more than one module: each reaches every other (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return groups


def import_graph() -> dict[str, set[str]]:
    """Who imports whom, without what the lazy tables look up."""
    return {name: set() if name in LAZY else of_project(name) for name in MODULES}


if __name__ == "__main__":
    for group in circles(import_graph()):
        print(", ".join(group))
