"""--show-prompt: every token on a line of its own, and what is odd about the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from llama.cli import show_prompt
from llama.config import Head
from llama.generate import Llama
from llama.sampling import SamplingParams
from llama.talk import Talk
from llama.tokenizer import open_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=2)
OWN = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


def llama(meta: dict[str, Any] | None = None, **config: Any) -> Llama:
    fake = FakeEngine(64, **config)
    if meta is not None:
        fake.meta = meta
    return Llama.on(fake)  # type: ignore[arg-type]


def test_a_byte_is_escaped_once(capsys: pytest.CaptureFixture[str]) -> None:
    llm = llama()
    show_prompt(llm, [*llm.tokenizer.encode("é'\n\\"), 1])
    lines = [line.split("  ", 1)[-1].strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "prompt: 6 tokens"
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == [
        r"'\xc3'", r"'\xa9'", r"'\''", r"'\n'", r"'\\'", "'<|im_start|>'  control",
    ]  # fmt: skip


@given(st.lists(st.integers(0, 255), min_size=1, max_size=6))
def test_what_is_shown_is_the_token(data: list[int]) -> None:
    """The line read as Python reads it gives the token's bytes again."""
    shown = [TOKENIZER.shown(byte + 3) for byte in data]
    assert all(text.isprintable() and text[0] == text[-1] == "'" for text in shown)
    again = b"".join(
        bytes([int(text[3:5], 16)]) if text[1:3] == "\\x" else eval(text).encode("latin-1")
        for text in shown
    )
    assert again == bytes(data)


TOKENIZER = open_tokenizer("json", byte_tokenizer(), 260, None, [], {})


def test_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    show_prompt(llama(bos_id=1), [1, 1, 5])
    assert "warning: the prompt begins with two begin tokens" in capsys.readouterr().err
    show_prompt(llama(bos_id=1), [1, 5, 1])
    assert "warning" not in capsys.readouterr().err
    show_prompt(llama(eos_ids=()), [5])
    assert "warning: the model names no end token; only" in capsys.readouterr().err
    show_prompt(llama(eos_ids=(), head=Head.SEQUENCE), [5])
    assert "warning" not in capsys.readouterr().err


def test_warnings_of_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    Talk(llama(), GREEDY, show=True).line("Hi")
    shown = capsys.readouterr().err
    assert "'<|im_start|>'  control" in shown and "warning" not in shown
    Talk(llama({"template.jinja": OWN}), GREEDY, show=True).line("Hi")
    assert "warning: a chat template of no known family; it is the file's own" in (
        capsys.readouterr().err
    )
    Talk(llama({"template.jinja": OWN}, eos_ids=()), GREEDY, show=True).line("Hi")
    assert "warning: no token ends an answer; only --max_tokens and --stop do" in (
        capsys.readouterr().err
    )
