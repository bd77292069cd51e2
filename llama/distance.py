"""How far one model file's answers are from another's, token by token: the arithmetic, and the
page of text that quantize.py's receipt is about; python3 -m llama.eval does it on any text.

At each position the two next-token distributions are compared. KL divergence (nats) says how
surprised someone who believes the second would be by the first; "same token" is how often both
would say the same next. Of models with other heads, or none, the numbers themselves are compared.
They are looked at a few rows at a time, so memory does not grow with the text, and hardly with the
vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama.config import Head
from llama.engine import Engine
from llama.errors import LlamaError
from llama.tokenizer import open_tokenizer

PAGE = """\
The lighthouse keeper wrote everything down. On the third of March the wind turned north-west and
blew for nine days; on the twelfth a barque called Marianne came in with a broken mast and eleven
men aboard. "We saw your lamp from six miles out," the captain said, "and I have never been so glad
of a light in my life." He stayed for supper, and they talked about Lisbon, about the price of
rope, and about his daughter, who was learning to play the violin.

Water boils at 100 degrees Celsius at sea level, but on a mountain of 3,000 metres it boils at
about 90, because the air presses on it less. That is why beans take longer to cook up there. The
heat that a stove puts into boiling water does not make it hotter; it turns it into steam.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Question: A train leaves at 14:20 and arrives at 17:05. How long does the journey take?
Answer: From 14:20 to 17:20 would be three hours. It arrives fifteen minutes earlier, so the
journey takes two hours and forty-five minutes.
"""
MAX_PASS = 256  # tokens of one forward pass,
PASS_LOGITS = 1 << 24  # and no more logits than this, 64 MiB
BLOCK_LOGITS = 1 << 20  # that become float64 at once: 8 MiB, which stays in the caches
PAGE_NAME = "a fixed page of text"


@dataclass(frozen=True)
class Distance:
    """Means over N positions."""

    n: int
    mean_kl: float  # nats
    same_token: float  # share of positions, 0 to 1
    text: str = PAGE_NAME

    def __str__(self) -> str:
        return (
            f"mean KL divergence {self.mean_kl:.2e} nats, same next token "
            f"{100 * self.same_token:.1f}% (of {self.n} positions of {self.text})"
        )


@dataclass(frozen=True)
class Deviation:
    """Over N positions: the root mean square of the difference over that of the outputs."""

    n: int
    relative_error: float
    text: str = PAGE_NAME

    def __str__(self) -> str:
        return (
            f"relative error of the outputs {100 * self.relative_error:.3f}% (rms, of {self.n} "
            f"positions of {self.text})"
        )


# --- the arithmetic


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(rows, vocab_size) log-probabilities, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(P || Q) in nats of each row of log-probabilities: sum of exp(p) * (p - q)."""
    kl: NDArray[np.float64] = np.einsum("ij,ij->i", np.exp(p), p - q)
    return np.maximum(kl, 0)  # it is never negative, but its rounding may be, by 1e-16


def same_token(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each row's likeliest token, the first of equals, is the same."""
    same: NDArray[np.bool_] = p.argmax(axis=1) == q.argmax(axis=1)
    return same


# --- the rows that it is done with


def outputs(
    engines: Sequence[Engine], ids: Sequence[int], first: int, end: int
) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
    """(position, each engine's outputs from there on): blocks of rows (rows, n_outputs) of what
    each says after ids[position], for the positions from FIRST to END, which is left out."""
    for engine in engines:
        engine.trim(0, 0)
    width = engines[0].config.n_outputs
    limit = max(1, min(MAX_PASS, PASS_LOGITS // width))
    block = max(1, BLOCK_LOGITS // width)
    start = 0
    while start < end:
        n = min(MAX_PASS, first - start) if start < first else min(limit, end - start)
        want = [start >= first] * n
        rows = [_forward(engine, ids, start, n, want) for engine in engines]
        for at in range(0, n if start >= first else 0, block):
            yield start + at, [one[at : at + block] for one in rows]
        start += n


def _forward(
    engine: Engine, ids: Sequence[int], start: int, n: int, want: Sequence[bool]
) -> NDArray[np.float32]:
    """ENGINE's rows for ids[start : start + n]; what it says is wrong has its file's name."""
    try:
        rows = engine.forward(ids[start : start + n], [0] * n, range(start, start + n), want,
                              rope_lengths=[len(ids)] * n)  # fmt: skip
    except LlamaError as error:
        raise LlamaError(f"{engine.model.path}: {error}") from None
    assert rows is not None
    return rows


# --- the page


def page(engine: Engine) -> list[int]:
    """The page as tokens, within the context; a fixed pattern where there is no tokenizer."""
    config = engine.config
    kind, data = engine.tokenizer
    if kind == "none":
        ids = [(7 * i + i * i) % config.vocab_size for i in range(256)]
    else:
        tokenizer = open_tokenizer(
            kind, data, config.vocab_size, config.bos_id, config.eos_ids, engine.meta
        )
        ids = tokenizer.encode(PAGE, bos=True)
    return ids[: min(512, config.max_seq_len)]


def measure(
    reference: str | os.PathLike[str], other: str | os.PathLike[str], threads: int | None = None,
    texts: Sequence[Sequence[int]] | None = None, name: str = PAGE_NAME,
) -> Distance | Deviation:  # fmt: skip
    """Runs both files over the page, or over TEXTS, token ids, called NAME; REFERENCE is the one
    that counts as right."""
    with ExitStack() as stack:
        engines = [
            stack.enter_context(Engine(path, threads=threads, max_seq_len=512))
            for path in (reference, other)
        ]
        a, b = (engine.config for engine in engines)
        if (a.head, a.n_outputs) != (b.head, b.n_outputs):
            raise LlamaError(
                f"{reference} and {other}: two models of the same head and number of outputs are "
                f"compared, found {a.n_outputs} and {b.n_outputs}"
            )
        texts = texts or [page(engines[0])]
        pairs = (pair for ids in texts for _, pair in outputs(engines, ids, 0, len(ids)))
        return compare(pairs, a.head, sum(map(len, texts)), name)


def compare(
    pairs: Iterable[Sequence[NDArray[np.float32]]], head: Head, n: int, name: str
) -> Distance | Deviation:
    """PAIRS are rows of what is right and of what is judged, N rows in all, of the text NAME."""
    kl, same, error, size = 0.0, 0, 0.0, 0.0
    for right, ours in pairs:
        if head == Head.LM:
            p, q = log_softmax(right), log_softmax(ours)
            kl += float(divergence(p, q).sum())
            same += int(same_token(p, q).sum())
        else:
            error += float(np.square(ours - right, dtype=np.float64).sum())
            size += float(np.square(right, dtype=np.float64).sum())
    if head == Head.LM:
        return Distance(n, kl / n, same / n, name)
    return Deviation(n, math.sqrt(error / size) if size else 0.0, name)
