"""A Llama in C, spoken to from Python: Llama, SamplingParams, Request, Gap, LlamaError.

Names are looked up when first asked for, so that the export wing (llama.checkpoints) imports
without the C library or cffi.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 10):  # noqa: UP036 (so that an older one says so)
    raise SystemExit(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")

if TYPE_CHECKING:
    from llama.errors import LlamaError
    from llama.generate import Llama
    from llama.infill import Gap
    from llama.request import Request
    from llama.sampling import SamplingParams

__all__ = ["Gap", "Llama", "LlamaError", "Request", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from llama.generate import Llama

        return Llama
    if name == "SamplingParams":
        from llama.sampling import SamplingParams

        return SamplingParams
    if name == "Gap":
        from llama.infill import Gap

        return Gap
    if name == "Request":
        from llama.request import Request

        return Request
    if name == "LlamaError":
        from llama.errors import LlamaError

        return LlamaError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
