"""The one exception of this project: what a user can put right, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


def one_line(text: object) -> str:
    """TEXT with an escape for what is no printable character: a line stays one line, and nothing
    that comes out of a file can speak to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class LlamaError(Exception):
    """One line that names the thing, what was expected and what was found.

    Texts out of a file may stand in it, so it is what one_line makes of MESSAGE.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever a library raises inside becomes a LlamaError that begins with WHAT; so do panics of
    Rust, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise LlamaError(f"{what}: {str(error)[:500]}") from None
