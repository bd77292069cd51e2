"""How far one model file's answers are from another's: on a page of text, token by token.

python3 -m llama.distance REFERENCE.bin OTHER.bin prints it; quantize.py puts it into its receipt.

Both read the same tokens; at each position the two next-token distributions are compared. KL
divergence (nats) says how surprised someone who believes the second would be by the first;
"same token" is how often both would say the same next. Of models with other heads, or none, the
numbers themselves are compared.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama.cli import Parser, run
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
PART = 64  # tokens compared at once, so that logits of a large vocabulary stay small


@dataclass(frozen=True)
class Distance:
    """Means over N positions."""

    n: int
    mean_kl: float  # nats
    same_token: float  # share of positions, 0 to 1

    def __str__(self) -> str:
        return (
            f"mean KL divergence {self.mean_kl:.2e} nats, same next token "
            f"{100 * self.same_token:.1f}% (of {self.n} positions of a fixed page of text)"
        )


@dataclass(frozen=True)
class Deviation:
    """Over N positions: the root mean square of the difference over that of the outputs."""

    n: int
    relative_error: float

    def __str__(self) -> str:
        return (
            f"relative error of the outputs {100 * self.relative_error:.3f}% (rms, of {self.n} "
            "positions of a fixed page of text)"
        )


def _page(engine: Engine) -> list[int]:
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


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(rows, vocab_size), in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _parts(ids: list[int], *engines: Engine) -> Iterator[list[NDArray[np.float32]]]:
    for start in range(0, len(ids), PART):
        part = ids[start : start + PART]
        n = len(part)
        places = range(start, start + n)
        found = [
            engine.forward(part, [0] * n, places, [True] * n, rope_lengths=[len(ids)] * n)
            for engine in engines
        ]
        yield [logits for logits in found if logits is not None]


def measure(
    reference: str | os.PathLike[str], other: str | os.PathLike[str], threads: int | None = None,
    activations: int | None = None,
) -> Distance | Deviation:  # fmt: skip
    """Runs both files over the page; REFERENCE is the one that counts as right."""
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine(path, threads=threads, max_seq_len=512, activations=activations)
            )
            for path in (reference, other)
        ]
        a, b = (engine.config for engine in engines)
        if (a.head, a.n_outputs) != (b.head, b.n_outputs):
            raise LlamaError(f"{reference} and {other}: two models of the same head and number of "
                             f"outputs are compared, found {a.n_outputs} and {b.n_outputs}")
        ids = _page(engines[0])
        if a.head != Head.LM:
            return _deviation(ids, *engines)
        kl, same = 0.0, 0
        for pair in _parts(ids, *engines):
            p, q = (_log_softmax(logits) for logits in pair)
            kl += float((np.exp(p) * (p - q)).sum())
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    return Distance(len(ids), kl / len(ids), same / len(ids))


def _deviation(ids: list[int], *engines: Engine) -> Deviation:
    error, size = 0.0, 0.0
    for right, ours in _parts(ids, *engines):
        error += float(np.square(ours - right, dtype=np.float64).sum())
        size += float(np.square(right, dtype=np.float64).sum())
    return Deviation(len(ids), math.sqrt(error / size) if size else 0.0)


def main() -> int:
    parser = Parser(
        prog="llama.distance", description="How far OTHER's answers are from REFERENCE's."
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the .bin that counts as right")
    parser.add_argument("other", metavar="OTHER", help="the .bin to judge")
    parser.add_argument("--activations", type=int, metavar="BITS", help="8 or 16 (default: 16)")
    given = parser.parse_args()
    print(measure(given.reference, given.other, activations=given.activations))
    return 0


if __name__ == "__main__":
    sys.exit(run("llama.distance", main))
