"""Charts and tables for the report page as HTML and inline SVG: no script, every string escaped.

Colours are CSS variables (see page.css), so a chart follows the reader's light or dark setting.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape as html_escape
from pathlib import Path

from minilora.report.curves import PANELS, Records, curve, read_metrics
from minilora.report.tables import is_number
from minilora.textfiles import printable

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 240, 52, 10, 12, 34
SERIES_COLOURS = 8  # --c0 .. --c7


def escape(text: object) -> str:
    """Any text as text of the page."""
    return html_escape(printable(text))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, 1, 2 or 5 times a power of ten apart, between low and high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str, series: Sequence[tuple[str, int, bool, list[float], list[float]]], marked: Sequence[float | None] = ()
) -> str:
    """series: (label, colour number, dashed, epochs, ys). A figure with axes, lines and a dot on
    each of few points; marked: the epoch of a ring on each whole line, by its colour number."""
    series = [line for line in series if line[3]]
    if not series:
        return ""
    xs, ys = [x for line in series for x in line[3]], [y for line in series for y in line[4]]
    (x0, x1), (y0, y1) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(y0, y1):
        at = place(x0, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x0, x1, 6):
        if x == round(x):
            parts.append(f'<text x="{place(x, y0)[0]:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{x:.4g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">epoch</text>')
    for label, colour, dashed, x, y in series:
        shade = f"c{colour % SERIES_COLOURS}"
        points = [place(a, b) for a, b in zip(x, y, strict=True)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        look = f'class="line {shade}{" dash" if dashed else ""}"'
        parts.append(f'<polyline {look} points="{line}"><title>{escape(label)}</title></polyline>')
        if len(points) <= 12:
            parts += [f'<circle class="dot {shade}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in points]
        ring = marked[colour] if marked and not dashed else None
        if ring in x:
            a, b = points[x.index(ring)]
            parts.append(f'<circle class="ring {shade}" cx="{a:.1f}" cy="{b:.1f}" r="6"/>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def curves_html(runs: Mapping[str, str | Path | Records], best: Mapping[str, int] | None = None) -> str:
    """{run: metrics.jsonl or its records} -> loss, accuracy and learning rate side by side, with
    one legend; best: {run: its best epoch}, which gets a ring."""
    found = {name: read_metrics(source) for name, source in runs.items()}
    marked = [(best or {}).get(name) for name in runs]
    charts = []
    for title, (scale, keys) in PANELS.items():
        series = [
            (f"{name}: {key}", number, dashed, *curve(records, key, scale))
            for number, (name, records) in enumerate(found.items())
            for key, dashed in keys
        ]
        charts.append(line_chart(title, series, marked=marked if title != "learning rate" else ()))
    if not any(charts):
        return ""
    names = "".join(
        f'<li><span class="key c{number % SERIES_COLOURS}"></span>{escape(name)}</li>'
        for number, name in enumerate(runs)
    )
    styles = '<li><span class="key solid"></span>validation</li><li><span class="key dashed"></span>training</li>'
    if any(marked):
        styles += '<li><span class="round"></span>best epoch, whose weights are kept</li>'
    return f'<ul class="legend">{names}{styles}</ul><div class="charts">{"".join(charts)}</div>'


def bars_html(rows: Sequence[tuple[str, float, str]], top: float | None = None) -> str:
    """Horizontal bars: (label, value, text at the end); `top`, else the largest, is full length."""
    top = top or max([value for _, value, _ in rows] or [0]) or 1.0
    lines = [
        f'<div class="bar"><span class="name" title="{escape(label)}">{escape(label)}</span>'
        f'<span class="track"><i style="width:{100 * min(max(value / top, 0), 1):.1f}%"></i></span>'
        f'<span class="value">{escape(text)}</span></div>'
        for label, value, text in rows
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def table_html(titles: Sequence, rows: Sequence[Sequence], best: int | None = None) -> str:
    """A table that scrolls by itself, numbers to the right; `best`: the row that stands out."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [bool(cells) and all(is_number(row[i]) for row in cells) for i in range(len(titles))]
    kind = [' class="n"' * numbers for numbers in right]
    head = "".join(f"<th{k}>{escape(str(title))}</th>" for k, title in zip(kind, titles, strict=True))
    body = "".join(
        f"<tr{' class=best' * (i == best)}>"
        + "".join(f"<td{k or short(cell)}>{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True))
        + "</tr>"
        for i, row in enumerate(cells)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def short(cell: str) -> str:
    """A name of one glance is not broken at its hyphens."""
    return ' class="short"' * (len(cell) <= 24)


def heat_table_html(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """A confusion matrix, row = truth, column = prediction; the shade is the share of the row."""
    head = "".join(f'<th class="up"><span>{escape(name)}</span></th>' for name in classes)
    body = []
    for i, (name, row) in enumerate(zip(classes, matrix, strict=True)):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss" if count else ""}" style="--v:{100 * count / total:.0f}%" '
            f'title="{escape(name)} called {escape(classes[j])}: {count}">{count or ""}</td>'
            for j, count in enumerate(row)
        )
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    parts = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table class="heat">{parts}</table></div>'
