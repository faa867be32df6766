"""How the source is set: margins, no orphaned words, no line broken for a comment's sake, no message in rubble."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

from tests.support.layout import MODULES, ROOT

WIDTH = 100  # of docstrings and comments; code may take 120
ORPHAN = 15  # characters: a shorter last line of a paragraph is an orphan
PIECE = 20  # characters: a shorter piece in the middle of a message is rubble


def docstrings(tree: ast.Module, source: str):
    """(first line, lines) of every docstring, with its quotes and its indentation."""
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                yield first.lineno, lines[first.lineno - 1 : first.end_lineno]


def comment_blocks(source: str):
    """(first line, lines) of every run of comments that stand on lines of their own."""
    block, start = [], 0
    for number, line in enumerate([*source.split("\n"), ""], 1):
        if line.lstrip().startswith("#"):
            start = start if block else number
            block.append(line.strip().lstrip("#"))
        elif block:
            yield start, block
            block = []


def paragraphs(first: int, lines: list[str]):
    """(number of its last line, its lines) of what blank lines divide."""
    block = []
    for number, line in enumerate([*lines, ""], first):
        if line.strip(' "'):
            block.append(line.replace('"""', ""))
        elif block:
            yield number - 1, block
            block = []


def logical_lines(source: str):
    """The tokens of each logical line, comments included."""
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            continue
        tokens.append(token)
        if token.type == tokenize.NEWLINE:
            yield [t for t in tokens if t.type != tokenize.NEWLINE]
            tokens = []


def faults(source: str) -> list[str]:
    """Every place of a file that breaks a rule, as `line: rule`."""
    tree, found = ast.parse(source), []
    for first, lines in docstrings(tree, source):
        found += [f"{first + i}: docstring over {WIDTH}" for i, line in enumerate(lines) if len(line) > WIDTH]
    blocks = [*docstrings(tree, source), *comment_blocks(source)]
    for number, block in (p for first, lines in blocks for p in paragraphs(first, lines)):
        if len(block) > 1 and len(block[-1].strip()) < ORPHAN:
            found.append(f"{number}: paragraph ends in {block[-1].strip()!r}")
    for tokens in logical_lines(source):
        for token in tokens:
            if token.type == tokenize.COMMENT and token.end[1] > WIDTH:
                found.append(f"{token.start[0]}: comment over {WIDTH}")
        if tokens[-1].type == tokenize.COMMENT and tokens[-1].start[0] > tokens[0].start[0]:
            code = [t for t in tokens if t.type != tokenize.COMMENT]
            texts = source.split("\n")[code[0].start[0] - 1 : code[-1].end[0]]
            texts[-1] = texts[-1][: code[-1].end[1]]
            if len(code) > 1 and code[0].start[0] < code[-1].end[0] and "#" not in "".join(texts):
                joined = texts[0].rstrip() + " ".join(text.strip() for text in texts[1:]).rstrip(", ")
                if len(joined) <= 120 and '"""' not in joined:
                    found.append(f"{code[0].start[0]}: broken to keep the comment behind it")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno > node.lineno:
            found += rubble(node, source)
    return found


def rubble(node: ast.expr, source: str) -> list[str]:
    """Pieces of one message, written on lines of their own, that are empty or too short, the last one aside."""
    text = ast.get_source_segment(source, node) or ""
    if "\n" not in text or text.lstrip("rbfRBF").startswith('"""'):
        return []
    try:
        pieces = literals(f"({text})")
    except (tokenize.TokenError, SyntaxError):
        return []
    short = [p for p in pieces[:-1] if len(p[1]) - 2 < PIECE] + [p for p in pieces if p[1] in ('""', "''")]
    alone = [p for p in short if sum(other[0] == p[0] for other in pieces) == 1]
    return [f"{node.lineno + line - 1}: message in rubble, {piece}" for line, piece in alone]


def literals(text: str) -> list[tuple[int, str]]:
    """(line, literal) of every string of an expression. An f-string, which Python 3.12 takes apart, is one."""
    found, begun, lines = [], [], text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            begun.append(token.start)
        elif kind == "FSTRING_END":
            (row, column), last = begun.pop(), token.end
            if not begun:
                found.append((row, lines[row - 1][column : last[1] if last[0] == row else None]))
        elif kind == "STRING" and not begun:
            found.append((token.start[0], token.string))
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstrings_comments_and_messages_are_set_with_care(name):
    path: Path = MODULES[name]
    assert not faults(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_the_rules_find_what_they_are_there_for():
    assert faults('"""A long first line of a paragraph that goes\non here."""')
    assert faults("x = (\n    1 + 2\n)  # three\n")
    assert faults('f(\n    "one long beginning of a message, "\n    ""\n    "and its end"\n)\n')
    assert faults("# a comment that is a whole paragraph\n# of.\nx = 1\n")
    assert not faults('"""One line."""\n\n# three\nx = 1 + 2\n')
