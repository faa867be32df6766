"""Reports: what a run has learned, for people.

In come plain numbers, arrays and pictures; out go text, PNG and one HTML page that opens offline.
Nothing here trains, loads a run or reads a data set, so every part can be used by itself.

metrics      accuracy, precision, recall, F1, confusion
vqa_metric   the official VQA accuracy, quirks included
tables       text and Markdown tables, runs compared
curves       loss and accuracy over the epochs
spectrum     what an update s B A looks like from inside
attention    where a vision transformer looks
samples      pictures in rows, confident mistakes
page         report.html, made of sections, svg and page.css
plots        matplotlib, if it is there

Begin with metrics (numbers), then spectrum (what LoRA did), then page (how it is shown).
What comes from the data is text on the page and never markup.
"""
