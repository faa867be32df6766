"""The report page: well-formed, nothing from outside, every string escaped, every section where there is data."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from minilora.report import page, samples
from minilora.report.metrics import classification_metrics
from minilora.report.tables import RunRow

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Reader(HTMLParser):
    """Collects tags and attributes, and holds that every tag that opens is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def photo(seed=0, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def full_data():
    """Every section, with a hostile string in every place that can hold one."""
    example = samples.Example(photo(), EVIL, EVIL + "2", 0.7, question=EVIL, choices=[(EVIL, 0.7)], name=EVIL)
    records = [{"epoch": e, "lr": 0.1, "train_loss": 1 / e, "val_loss": 2 / e, "accuracy": 0.5} for e in (1, 2, 3)]
    return page.ReportData(
        EVIL,
        subtitle=EVIL,
        facts={EVIL: EVIL},
        scores=[(EVIL, EVIL, EVIL)],
        runs=[RunRow(EVIL, "lora", "g", s, accuracy=0.8 + s / 100, seconds=2.0) for s in range(3)],
        curves={EVIL: records},
        metrics=classification_metrics([0, 1, 1, 0], [0, 1, 0, 1], [EVIL, "cat"]),
        vqa={
            "metric": EVIL,
            "overall": 50.0,
            "count": 2,
            "by_answer_type": {EVIL: 50.0},
            "by_question_type": {EVIL: 9.0},
        },
        answer_histogram=[(EVIL, 3)],
        parameters=page.parameter_rows([(EVIL, 10, True)]),
        parameter_line=EVIL,
        figures=[page.Figure(EVIL, photo(), EVIL)],
        tables=[page.Table(EVIL, [EVIL], [[EVIL]], EVIL)],
        samples={EVIL: [photo(1), photo(2)]},
        mistakes=[example],
        unsure=[example],
        examples=[example, samples.Example(None, "", EVIL)],
        configuration={EVIL: EVIL, "list": [EVIL]},
        versions={"python": EVIL},
    )


def test_the_page_is_well_formed_and_loads_nothing_from_outside(tmp_path):
    text = page.write_report(full_data(), tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader(text)
    for tag, key, value in reader.attributes:
        if key in ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"):
            assert value.startswith(("data:image/", "#")), (tag, key, value[:60])
        assert not key.startswith("on") and "url(" not in value
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert not re.search(r"[\"'(]//", text)


def test_a_class_called_script_is_shown_and_not_run():
    text = page.render_report(full_data())
    assert "<script" not in text.lower() and EVIL in Reader(text).text
    assert "alert('x')" not in text  # quotes are escaped too, for attributes


def test_every_link_of_the_navigation_has_its_heading():
    reader = Reader(page.render_report(full_data()))
    links = {value[1:] for tag, key, value in reader.attributes if (tag, key) == ("a", "href")}
    assert links == {value for tag, key, value in reader.attributes if (tag, key) == ("h2", "id")} and len(links) == 16


def test_a_page_with_a_title_alone_has_no_empty_sections():
    reader = Reader(page.render_report(page.ReportData("only a title")))
    assert "h2" not in reader.tags and "table" not in reader.tags and "only a title" in reader.text


def test_several_seeds_show_mean_spread_and_every_run():
    text = Reader(page.render_report(full_data())).text
    assert "81.00 ± 1.00" in text and "(3 seeds)" in text and "82.00" in text


def test_many_classes_show_the_weakest_and_the_most_confused():
    true = np.arange(120)
    data = page.ReportData(
        "many", metrics=classification_metrics(true, np.where(true == 7, 8, true), [f"c{i}" for i in true])
    )
    text = Reader(page.render_report(data)).text
    assert "40 of 120 classes" in text and "c7 called c8 (1)" in text


def test_equal_layers_are_one_row_of_the_parameter_table():
    names = [
        (f"blocks.{i}.attn.q_proj.{part}.weight", 8, part != "base_layer")
        for i in range(3)
        for part in ("base_layer", "lora_A", "lora_B")
    ]
    rows = page.parameter_rows([*names, ("head.weight", 5, True), ("head.bias", 1, True)])
    assert rows == [("blocks.*.attn.q_proj", 3, 48, 72), ("head", 1, 6, 6)]


def test_mistakes_are_sorted_by_confidence_and_unknown_labels_are_none():
    assert samples.most_confident_mistakes([0, 1, 1, -1], [1, 1, 0, 0], [0.6, 0.9, 0.8, 0.99]) == [2, 0]
    assert samples.least_sure([[0.9, 0.1], [0.51, 0.49], [0.6, 0.4]], 2) == [1, 2]


def test_a_normalised_picture_comes_back_as_it_was():
    original = photo(3, (8, 8))
    values = np.asarray(original, dtype=np.float32).transpose(2, 0, 1) / 255
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])
    back = samples.to_picture((values - mean[:, None, None]) / std[:, None, None], {"mean": mean, "std": std})
    assert np.array_equal(np.asarray(back), np.asarray(original))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_every_mode_fit_into_the_page(mode):
    assert samples.data_uri(photo().convert(mode), 16).startswith("data:image/")


def test_a_picture_table_holds_all_pictures_and_cuts_long_names():
    labels, rows = ["a very long class name " * 9, "two\nlines \x1b[2J"], [[photo()], [photo(), photo()]]
    sheet = samples.picture_table(rows, labels, ["x" * 10**6], side=32)
    assert sheet.height >= 2 * 32 and 64 < sheet.width < 300
    assert samples.picture_table(rows, labels, side=32, captions=[["a"], ["b\nc", ""]]).height > sheet.height


HOSTILE = "\x1b]0;x\x07\n\u202eevil\udcff $\\foo$"


def test_nothing_in_a_name_acts_on_the_page():
    data = full_data()
    for field in ("title", "subtitle"):
        setattr(data, field, HOSTILE)
    data.facts, data.samples, data.curves = {HOSTILE: HOSTILE}, {HOSTILE: [photo()]}, {HOSTILE: [{"epoch": 1, "lr": 0}]}
    data.mistakes = [samples.Example(photo(), HOSTILE, HOSTILE, name=HOSTILE, question=HOSTILE, choices=[(HOSTILE, 1)])]
    data.tables = [page.Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)]
    data.metrics = classification_metrics([0, 1], [1, 0], [HOSTILE, "cat"])
    text = page.render_report(data)
    assert not {"\x1b", "\x07", "\u202e", "\udcff"} & set(text)
    assert text.encode() and r"\x1b]0;x\x07\n\u202eevil\udcff $\foo$" in Reader(text).text


def compared():
    """A page of two runs on one data set and one on another, each with mistakes of its own."""
    same, other = {"data": "photos, val (9 pictures)", "model": "vit"}, {"data": "other, val (9 pictures)"}
    rows = [
        RunRow("a", "lora", "g1", accuracy=0.5, epochs="3", **same),
        RunRow("b", "full", "g2", accuracy=0.7, epochs="2 of 3", **same),
        RunRow("c", "lora", "g3", accuracy=0.9, epochs="3", model="swin", **other),
    ]
    parts = [
        page.ReportData(row.name, mistakes=[samples.Example(photo(), "cat", f"said by {row.name}")]) for row in rows
    ]
    return page.ReportData("a and b and c", runs=rows, parts=parts)


def test_a_comparison_ranks_runs_on_the_same_data_alone_and_says_what_each_was():
    text = page.render_report(compared())
    assert re.findall(r"<h3>([^<]+)</h3>", text) == ["photos, val (9 pictures)", "other, val (9 pictures)"]
    for title in ("model", "data", "epochs", "mode"):
        assert re.search(rf"<th( class=\"n\")?>{title}</th>", text), title
    (best,) = re.findall(r'<tr class=best><td class="short">(\w)</td>', text)
    assert best == "b" and "2 of 3" in text  # c, on other data, is best of its own


def test_each_section_of_a_comparison_says_whose_it_is():
    text = page.render_report(compared())
    for name in "abc":
        assert f'Confident mistakes<span class="whose">{name}</span></h2>' in text
    whose = re.split(r'<h2 class="run">', text)
    assert [f"said by {name}" in part for name, part in zip("abc", whose[1:], strict=True)] == [True] * 3


def test_no_table_of_one_run_repeats_another():
    data = page.ReportData("one", runs=[RunRow("a", "lora", accuracy=0.5)], scores=[("this run", "val", "50.00 %")])
    text = page.render_report(data)
    assert text.count("<table") == 1 and "50.00 %" in text


def test_types_of_one_kind_are_no_chart():
    kinds = {"by_answer_type": {"other": 40.0}, "by_question_type": {"what": 30.0, "who": 50.0}}
    text = page.render_report(page.ReportData("one", vqa={"metric": "m", "overall": 40.0, "count": 5} | kinds))
    assert "By answer type" not in text and "By question type" in text
