"""The sections of the report page: plain data in, HTML out, "" if there is nothing to show."""

from collections.abc import Mapping, Sequence

from minilora.report.metrics import class_table, most_confused
from minilora.report.samples import Example, data_uri
from minilora.report.svg import bars_html, escape, heat_table_html, table_html
from minilora.report.tables import LOSSES, RunRow, by_data, comparison_cells, group_runs

MOST_SAMPLED = 30  # classes whose pictures are shown
MOST_CLASSES = 40  # more than that are neither a readable confusion table nor readable bars


def facts(values: Mapping[str, str]) -> str:
    boxes = "".join(f"<div><b>{escape(str(v))}</b><span>{escape(str(k))}</span></div>" for k, v in values.items())
    return f'<div class="facts">{boxes}</div>' if boxes else ""


def results(runs: Sequence[RunRow]) -> str:
    """Several runs compared, a table for each data set, and what those have no column for."""
    if len(runs) < 2:
        return ""
    html, sets = "", by_data(runs)
    for data, some in sets.items():
        means = [group.mean("accuracy") or -1.0 for group in group_runs(some)]
        best = means.index(max(means)) if len(means) > 1 else None
        html += f"<h3>{escape(data or 'Comparison')}</h3>" + table_html(*comparison_cells(some), best=best)
    if len(sets) > 1:
        html += '<p class="note">Runs on other data stand in a table of their own; scores compare within one.</p>'
    heads, cells = comparison_cells(runs, LOSSES)
    if len(heads) > 1:
        html += "<h3>Losses and weighted averages</h3>" + table_html(heads, cells)
    if seeds := [run for group in group_runs(runs) if len(group.runs) > 1 for run in group.runs]:
        html += '<p class="note">± is the sample standard deviation over runs that differ in their seed only.</p>'
        heads = ["run", "seed", "accuracy %", "seconds"]
        rows = [
            [r.name, _text(r.seed), "" if r.accuracy is None else f"{100 * r.accuracy:.2f}", _text(r.seconds, ".1f")]
            for r in seeds
        ]
        html += f"<h3>Every seed</h3>{table_html(heads, rows)}"
    return html


def per_class(metrics: Mapping | None) -> str:
    """Bars of F1, or average precision, beside the numbers; of many classes the weakest."""
    if not metrics or not metrics["per_class"]:
        return ""
    key, name, last, end = "f1", "F1", "weighted", "The weighted recall is the accuracy."
    if "map" in metrics:
        key, name, last = "ap", "Average precision", "all labels"
        end = f"Precision, recall and F1 are of the labels above {metrics['threshold']:.3f}."
    rows, note = [row for row in metrics["per_class"] if row["support"] or row["predicted"]], ""
    if len(rows) > MOST_CLASSES:
        note = f"The {MOST_CLASSES} of {len(rows)} classes with the lowest {name}."
        rows = sorted(rows, key=lambda row: row[key] or 0)[:MOST_CLASSES]
    bars = bars_html([(row["class"], row[key] or 0, f"{100 * (row[key] or 0):.1f}") for row in rows], top=1.0)
    total = metrics | {"class": last, "support": metrics["count"], "ap": metrics.get("map")}
    numbers = table_html(*class_table([*rows, total], 1))
    return (
        f'<p class="note">{name} per class in percent. {escape(note)} {end}</p><div class="two">{bars}{numbers}</div>'
    )


def confusion(metrics: Mapping | None) -> str:
    if not metrics or metrics.get("confusion") is None or len(metrics["classes"]) < 2:
        return ""
    pairs = most_confused(metrics, 8)
    listed = "; ".join(f"{truth} called {said} ({count})" for truth, said, count in pairs)
    html = f'<p class="note">Most frequent mistakes: {escape(listed)}.</p>' if pairs else ""
    if len(metrics["classes"]) <= MOST_CLASSES:
        note = '<p class="note">Rows are the truth, columns the prediction; the shade is the share of the row.</p>'
        html = note + heat_table_html(metrics["classes"], metrics["confusion"]) + html
    return html


def question_types(vqa: Mapping | None) -> str:
    if not vqa:
        return ""
    html = f"<p>{escape(vqa['metric'])}: <b>{vqa['overall']:.2f} %</b> on {vqa['count']} questions.</p>"
    for key, title in (("by_answer_type", "By answer type"), ("by_question_type", "By question type")):
        rows = sorted(vqa.get(key, {}).items(), key=lambda item: -item[1])
        if len(rows) > 1:  # one alone is the line above
            html += f"<h3>{title}</h3>" + bars_html([(name, value, f"{value:.2f}") for name, value in rows], top=100.0)
    return html


def histogram(counts: Sequence[tuple[str, int]], most: int = 20) -> str:
    if not counts:
        return ""
    total = sum(count for _, count in counts)
    rows = [(answer, count, f"{count:,}") for answer, count in counts[:most]]
    covered = sum(count for _, count in counts[:most]) / max(total, 1)
    note = f"The {len(rows)} most frequent of {len(counts):,} answers cover {100 * covered:.1f} % of the questions."
    return f'<p class="note">{escape(note)}</p>' + bars_html(rows)


def figure(item) -> str:
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    return f'{note}<div class="figure"><img src="{data_uri(item.image)}" alt="{escape(item.title)}"></div>'


def table(item) -> str:
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    return (table_html(item.columns, item.rows) + note) if item.rows else ""


def cards(examples: Sequence[Example], note: str) -> str:
    """One card per example: picture, question, truth and answer, or choices and probabilities."""
    if not examples:
        return ""
    wide = " long" * any(example.question or example.choices for example in examples)
    head = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'{head}<div class="cards{wide}">{"".join(map(_card, examples))}</div>'


def _card(example: Example) -> str:
    lines = [f'<p class="q">{escape(example.question)}</p>'] if example.question else []
    look = {True: "good", False: "bad", None: ""}[example.correct]
    for text, probability in example.choices:
        marks = ("✓ " if text == example.truth else "") + ("→ " if text == example.answer else "")
        lines.append(
            f'<div class="choice" style="--v:{100 * probability:.0f}%"><span>{marks}{escape(text)}</span>'
            f'<span class="sure">{100 * probability:.0f}\u00a0%</span></div>'
        )
    sure = "" if example.probability is None else f' <span class="sure">{100 * example.probability:.0f}\u00a0%</span>'
    truth = escape(example.truth) if example.truth else '<span class="soft">unknown</span>'
    lines.append(f'<p><span class="soft">true</span> {truth}</p>')
    lines.append(f'<p><span class="soft">said</span> <b class="{look}">{escape(example.answer)}</b>{sure}</p>')
    if example.name:
        lines.append(f'<p class="file">{escape(example.name)}</p>')
    return f'<div class="card">{_picture(example.image, 320)}<div>{"".join(lines)}</div></div>'


def _picture(image, limit: int) -> str:
    if image is None:
        return ""
    tiny = ' class="tiny"' if max(image.size) < 100 else ""
    return f'<img{tiny} src="{data_uri(image, limit)}" alt="">'


def samples(classes: Mapping[str, Sequence], most: int = MOST_SAMPLED) -> str:
    rows = "".join(
        f'<div class="strip"><span class="name">{escape(name)}</span>'
        f'<span class="row">{"".join(_picture(image, 168) for image in pictures)}</span></div>'
        for name, pictures in list(classes.items())[:most]
    )
    left = f'<p class="note">{len(classes) - most} more classes are not shown.</p>' if len(classes) > most else ""
    return rows + left


def parameters(rows: Sequence[tuple], line: str) -> str:
    cells = [
        [module, count, f"{trainable:,}", f"{size:,}", f"{100 * trainable / max(size, 1):.2f}"]
        for module, count, trainable, size in rows
    ]
    html = f"<p>{escape(line)}</p>" if line else ""
    return html + (table_html(["module", "layers", "trainable", "all", "trainable %"], cells) if cells else "")


def settings(values: Mapping) -> str:
    rows = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(value_text(value))}</dd></div>" for key, value in values.items()
    )
    return f'<dl class="config">{rows}</dl>' if rows else ""


def value_text(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "-" if value is None or value == "" else str(value)


def _text(value, form: str = "") -> str:
    return "" if value is None else format(value, form)
