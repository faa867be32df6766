"""The files that are shipped, by their dotted names."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("train", "evaluate")


def modules() -> dict[str, Path]:
    """{dotted name: file} of everything that is shipped."""
    files = [path for package in ("minilora", "reference_models") for path in (ROOT / package).rglob("*.py")]
    files += [ROOT / f"{name}.py" for name in PROGRAMS]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()
