"""`report.html`: one file that opens offline and shows what one or several runs have learned.

Fill a `ReportData` with what there is and call `write_report(data, path)`; sections without data
are left out. Pictures are inside the page as data: URIs, charts are inline SVG, there is no script
and no reference to anything outside, and every string that comes from the data is escaped.
"""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import Image

from minilora.atomic import atomic_write
from minilora.report import sections
from minilora.report.samples import Example
from minilora.report.svg import curves_html, escape
from minilora.report.tables import RunRow
from minilora.version import __version__

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


@dataclass
class Figure:
    """A picture made elsewhere (attention, spectrum), with a heading and how to read it."""

    title: str
    image: Image.Image
    note: str = ""


@dataclass
class Table:
    """Any further table, such as the spectrum of the updates; `note` is a paragraph below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]
    note: str = ""


@dataclass
class ReportData:
    """Everything the page can show. Only `title` must be given.

    facts: a few headline numbers, {"accuracy": "93.8 %", ...}, shown large at the top.
    scores: (what, on what, accuracy) of one run and of what it is to be compared with.
    runs: the runs compared; several of equal `group` are averaged, with their spread.
    curves: {run name: metrics.jsonl or its records}; best: {run name: its best epoch}.
    metrics: the dictionary of `classification_metrics`, vqa: that of `score_vqa`.
    parameters: rows of `parameter_rows`, and `parameter_line` the one-line sum.
    answer_histogram: (answer, count), most frequent first; the first 20 are drawn.
    samples: {class: pictures}; mistakes, unsure, examples: lists of Example.
    parts: of a comparison, what is one run's alone; its title stands in each of its headings.
    """

    title: str
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[tuple[str, str, str]] = ()
    runs: Sequence[RunRow] = ()
    curves: Mapping[str, object] = field(default_factory=dict)
    best: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping | None = None
    vqa: Mapping | None = None
    answer_histogram: Sequence[tuple[str, int]] = ()
    parameters: Sequence[tuple] = ()
    parameter_line: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Mapping[str, Sequence[Image.Image]] = field(default_factory=dict)
    mistakes: Sequence[Example] = ()
    unsure: Sequence[Example] = ()
    examples: Sequence[Example] = ()
    configuration: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence["ReportData"] = ()


def page_sections(data: ReportData) -> list[tuple[str, str]]:
    """(heading, HTML) of everything that there is to show."""
    parts = [
        ("Scores", sections.table(Table("Scores", ["", "on", "score"], data.scores))),
        ("Results", sections.results(data.runs)),
        ("Curves", curves_html(data.curves, data.best)),
        ("Per class", sections.per_class(data.metrics)),
        ("Confusion", sections.confusion(data.metrics)),
        ("Question types", sections.question_types(data.vqa)),
        ("Answers", sections.histogram(data.answer_histogram)),
        *((figure.title, sections.figure(figure)) for figure in data.figures),
        ("Confident mistakes", sections.cards(data.mistakes, "Wrong, and sure of it: the surest first.")),
        ("Least sure", sections.cards(data.unsure, "The two most probable answers are nearly equal.")),
        ("Examples", sections.cards(data.examples, "")),
        ("Samples", sections.samples(data.samples)),
        ("Parameters", sections.parameters(data.parameters, data.parameter_line)),
        *((table.title, sections.table(table)) for table in data.tables),
        ("Configuration", sections.settings(data.configuration)),
        ("Versions", sections.settings(data.versions)),
    ]
    return [(title, body) for title, body in parts if body]


def render_report(data: ReportData) -> str:
    """The page as one string of HTML: what is common to all runs, then the parts of each."""
    links, body = "", ""
    for number, part in enumerate((data, *data.parts)):
        whose = f'<span class="whose">{escape(part.title)}</span>' if number else ""
        if number:
            body += f'<h2 class="run">{escape(part.title)}</h2><p class="sub">{escape(part.subtitle)}</p>'
            body += sections.facts(part.facts)
        places = {f"s{number}-{i}": section for i, section in enumerate(page_sections(part))}
        links += f"<nav>{whose}" + "".join(f'<a href="#{at}">{escape(title)}</a>' for at, (title, _) in places.items())
        links += "</nav>"
        body += "".join(f'<h2 id="{at}">{escape(title)}{whose}</h2>{html}' for at, (title, html) in places.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(data.title)}</h1><p class="sub">{escape(data.subtitle)}</p>'
        f"{sections.facts(data.facts)}{links}{body}</body></html>\n"
    )


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page (whole or not at all) and return its path."""
    atomic_write(Path(path), render_report(data))
    return Path(path)


def parameter_rows(parameters: Iterable[tuple[str, int, bool]]) -> list[tuple[str, int, int, int]]:
    """(name, size, trainable) of each parameter -> (module, how many of it, trainable, all), equal
    layers together: "blocks.0.attn.q_proj.lora_A.weight" is of the row "blocks.*.attn.q_proj"."""
    rows: dict[str, list] = {}
    for name, size, trainable in parameters:
        module = re.sub(r"\.(base_layer|lora_[AB]|lora_magnitude_vector)\b", "", name)
        module = re.sub(r"\.(weight|bias)$", "", module)
        row = rows.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), [set(), 0, 0])
        row[0].add(module)
        row[1] += size if trainable else 0
        row[2] += size
    return [(module, len(names), trainable, size) for module, (names, trainable, size) in rows.items()]


def collect_versions() -> dict[str, str]:
    """Python, the libraries that take part, system and number of processors."""
    found = {"python": platform.python_version(), "minilora": __version__}
    for name in ("torch", "torchvision", "numpy", "pillow", "safetensors", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"system": f"{platform.system()} {platform.machine()}", "processors": str(os.cpu_count())}
