"""The one exception of this package.

A message is one line that names the thing, what was expected and what was found: scripts print
it after their own name and exit 1, so nobody meets a traceback for a file that is merely bad.
"""


class LlamaError(Exception):
    """Something outside the program is wrong; the message is one line for a person."""
