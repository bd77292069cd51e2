"""LlamaError is one printable line, whatever a hostile file put into it."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from llama import LlamaError


@given(st.text())
def test_always_one_printable_line(text: str) -> None:
    shown = str(LlamaError(text))
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
    assert str(pickle.loads(pickle.dumps(LlamaError(text)))) == shown


def test_escapes_are_shown() -> None:
    assert str(LlamaError("a\nb\x1b[31m\ud800")) == r"a\nb\x1b[31m\ud800"
