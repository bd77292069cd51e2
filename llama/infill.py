"""Infilling: a prompt of what stands before a gap and after it, as Code Llama was trained for it
(arXiv:2308.12950, section 2.3; Meta's codellama/llama/generation.py, infilling_prompt_tokens).

The suffix is encoded without the space that SentencePiece puts before a text, and the middle, which
continues the prefix, is decoded without dropping one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama.errors import LlamaError
from llama.tokenizer import Tokenizer

Order = Literal["psm", "spm"]
ORDERS = ("psm", "spm")


@dataclass(frozen=True)
class Gap:
    """A prompt that asks for what belongs between PREFIX and SUFFIX.

    ORDER "psm": <PRE> prefix <SUF> suffix <MID>; "spm": <PRE> <SUF> suffix <MID> prefix, where
    the answer follows its beginning at once."""

    prefix: str
    suffix: str
    order: Order = "psm"

    def __post_init__(self) -> None:
        for name in ("prefix", "suffix"):
            if not isinstance(getattr(self, name), str):
                found = type(getattr(self, name)).__name__
                raise LlamaError(f"{name} must be a str, found {found}")
        if self.order not in ORDERS:
            raise LlamaError(f"order must be psm or spm, found {self.order!r}")


class Infiller:
    """How one model is asked to fill a gap; LlamaError where it was not trained to."""

    def __init__(self, tokenizer: Tokenizer, meta: Mapping[str, Any]) -> None:
        if "infill.refused" in meta:
            raise LlamaError(f"this model does not infill: {meta['infill.refused']}")
        if "infill.tokens" not in meta:
            raise LlamaError(
                "this model does not infill: its vocabulary lacks the tokens that Code Llama "
                "marks the gap with"
            )
        try:
            ids = {str(k): tokenizer.check(v) for k, v in json.loads(meta["infill.tokens"]).items()}
            self._prefix, self._suffix = ids["prefix"], ids["suffix"]
            self._middle, self._end = ids["middle"], ids["end"]
        except (TypeError, ValueError, AttributeError, KeyError, LlamaError):
            raise LlamaError(
                'infill.tokens must be JSON, {"prefix": id, "suffix": id, "middle": id, "end": id}'
            ) from None
        self._tokenizer = tokenizer
        self.stop_ids = frozenset([self._end, *tokenizer.eos_ids])

    def encode(self, gap: Gap) -> list[int]:
        """The ids that GAP becomes."""
        tokenizer = self._tokenizer
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # always one more space, also where the text begins with one
        before = tokenizer.encode(f" {gap.prefix}", continues=True) if gap.prefix else []
        after = tokenizer.encode(gap.suffix, continues=True)
        if gap.order == "psm":
            return [*begin, self._prefix, *before, self._suffix, *after, self._middle]
        return [*begin, self._prefix, self._suffix, *after, self._middle, *before]
