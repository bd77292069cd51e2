"""README's table of the family is held: each cell names tests and cases that there are, each
release that the tests know has its row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = r"`(\w+)(?:\[([^\]]+)\])?`"  # `Shapes[7B, 13B]`
COLUMNS = ["model", "checkpoint", "tokenizer", "chat template", "positions", "besides"]


@cache
def tables() -> list[list[list[str]]]:
    """The section's two tables, the family and the short names: rows of cells, without heads."""
    section = (ROOT / "README.md").read_text("utf-8").split("\n## Every Llama\n")[1]
    found: list[list[list[str]]] = []
    for block in section.split("\n## ")[0].split("\n\n"):
        if block.startswith("|"):
            rows = [line.strip().strip("|").split("|") for line in block.strip().splitlines()]
            cells = [[cell.strip() for cell in row] for row in rows]
            assert found or cells[0] == COLUMNS
            found.append(cells[2:])
    assert len(found) == 2
    return found


@cache
def legend() -> dict[str, tuple[str, str]]:
    """A short name's file and function."""
    named: dict[str, tuple[str, str]] = {}
    for file, tests in tables()[1]:
        for short, test in re.findall(r"`(\w+)` (\w+)", tests):
            assert short not in named, short
            named[short] = file, test
    return named


def cells() -> Iterator[tuple[str, str, str]]:
    for model, *facts in tables()[0]:
        assert len(facts) == len(COLUMNS) - 1, model
        for column, cell in zip(COLUMNS[1:], facts, strict=True):
            yield model, column, cell


@cache
def parts(file: str) -> tuple[set[str], set[str]]:
    """The names of a file's functions, and the texts that stand in it."""
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    texts = {node.value for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    return functions, texts


def test_each_cell_names_a_test() -> None:
    for model, column, cell in cells():
        empty = cell == "" and column != "checkpoint"
        assert empty or re.search(SHORT, cell), f"{model}, {column}: {cell}"


def test_the_tests_are_there() -> None:
    assert len(legend()) > 50
    for short, (file, test) in legend().items():
        assert test in parts(file)[0], f"{short}: there is no {file}::{test}"


def test_the_cases_are_there() -> None:
    used = set()
    for model, _, cell in cells():
        for short, cases in re.findall(SHORT, cell):
            used.add(short)
            assert short in legend(), f"{model}: {short}"
            for case in filter(None, cases.split(", ")):
                file, test = legend()[short]
                assert case in parts(file)[1], f"{model}: {test} has no case {case}"
    assert used == legend().keys()


def test_each_release_has_its_row() -> None:
    """The published shapes and configs."""
    named: dict[str, set[str]] = {}
    for _, _, cell in cells():
        for short, cases in re.findall(SHORT, cell):
            named.setdefault(short, set()).update(cases.split(", "))
    files = {"Shapes": ("test_real_shapes.py", r'Release\("([^"]+)"'),
             "Config": ("test_published.py", r'(?m)^    "([\w.-]+)": said\(')}  # fmt: skip
    for short, (file, pattern) in files.items():
        known = set(re.findall(pattern, (ROOT / "tests" / file).read_text("utf-8")))
        assert len(known) > 15 and known == named[short] - {""}
