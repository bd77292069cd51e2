"""The one exception of this project: what a user can put right, in one line."""


class LlamaError(Exception):
    """One line that names the thing, what was expected and what was found.

    Texts out of a file may stand in it, so what is no printable character is shown as its escape:
    a line stays one line, and nothing in it can speak to a terminal.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        )
