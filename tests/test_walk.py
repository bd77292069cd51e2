"""docs/walk.md names functions and files: each function must exist where the walk says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WALK = (ROOT / "docs" / "walk.md").read_text()
NAMED = sorted(set(re.findall(r"`(\w+)` in\s+`([\w/.]+)`", WALK)))
FILES = sorted(set(re.findall(r"`((?:lib|llama|docs)/[\w/.]+)`", WALK)))


def test_the_walk_names_enough() -> None:
    assert len(NAMED) >= 25


@pytest.mark.parametrize(("name", "path"), NAMED)
def test_function_is_there(name: str, path: str) -> None:
    text = (ROOT / path).read_text()
    if path.endswith(".py"):
        defined = rf"^\s*(?:def|class) {name}\b"
    else:
        defined = rf"^(?!\s)[\w\s*]*\b{name}\([^;]*?\)\s*\{{"
    assert re.search(defined, text, re.MULTILINE), f"{path} does not define {name}"


@pytest.mark.parametrize("path", FILES)
def test_file_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


def test_steps_are_the_forward_pass() -> None:
    """The table lists the steps in the order in which cpu_forward calls them."""
    source = (ROOT / "lib" / "cpu" / "forward.c").read_text()
    body = source[source.index("static int cpu_forward") :]
    step = r"^\s+(?:out = )?(\w+)\(&p(?:\)|, rows->hidden)"
    calls = re.findall(step, body[: body.index("\n}")], re.MULTILINE)
    assert calls == re.findall(r"^\| `(\w+)` in `lib/cpu/forward.c`", WALK, re.MULTILINE)
