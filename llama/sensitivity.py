"""How much the rounding of each matrix moves a model's answers: measured, one at a time.

A few texts go through the source, layer by layer. Beside them go copies in which one matrix was
rounded, every other being the source's: from the layer where that matrix stands to the answers.
Each layer is read once for all of them, and memory holds the copies' residual streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llama.calibrate import STAGES
from llama.config import Head
from llama.engine import Engine, Floats
from llama.stages import END, HEAD, Blocks, multiply, run_stage

MATRICES = [name for names in STAGES for name in names]
QKV, OUTPUT, GATE_UP, DOWN = range(4)
LENGTH = 128  # tokens of one text at most,
MOST = 512  # and of all; fewer in a large model, for which all copies together shall take so many
WORK = 5e13  # multiply-adds: some minutes of two cores
LEAST = 64
BLOCK_LOGITS = 1 << 25  # that are there at once: 128 MiB


def sample(
    texts: Sequence[Sequence[int]], n_layers: int, in_layers: int, in_head: int
) -> list[list[int]]:
    """The beginnings of some of TEXTS that a model of so many layers, and weights in them and in
    its head, can afford; from all over them."""
    copies = len(MATRICES) * n_layers  # that go through half of the layers, on average
    n = int(min(MOST, max(LEAST, WORK / (copies * (in_layers / 2 + in_head)))))
    count = min(-(-n // LENGTH), len(texts))
    chosen = [texts[len(texts) * i // count] for i in range(count)]
    return [list(text[: min(LENGTH, -(-n // count))]) for text in chosen]


class Sensitivity:
    """The source in ENGINE (with room for the texts, and an f32 cache) and copies of its streams.

    TEXTS are token ids. layer() for each layer in turn, then losses().
    """

    def __init__(
        self, engine: Engine, texts: Sequence[Sequence[int]], embed: Callable[[int], Floats],
        threads: int | None = None, done: Callable[[int], object] = lambda steps: None,
    ) -> None:  # fmt: skip
        self.engine, self.texts, self.threads, self._done = engine, texts, threads, done
        self._base = [np.stack([embed(token) for token in text]) for text in texts]
        self._copies: dict[str, list[Floats]] = {}

    def steps(self) -> int:
        """How often layers are run in all, which done() hears of: one copy's pass of one each."""
        n = self.engine.config.n_layers
        return n * (len(self._copies) + 1) + len(MATRICES) * n * (n + 1) // 2

    def embedding(self, name: str, embed: Callable[[int], Floats]) -> None:
        """A copy that begins with embeddings as EMBED gives them."""
        self._copies[name] = [np.stack([embed(token) for token in text]) for text in self.texts]

    def layer(self, number: int, blocks: Mapping[str, Blocks]) -> None:
        """Takes all copies through layer NUMBER, and begins one for each matrix, by name, of it
        that is rounded to BLOCKS."""
        for copy in self._copies.values():
            for stream in copy:
                self._rest(number, OUTPUT, stream, stream, {})
            self._done(1)
        for stream in self._base:
            self._begin(number, stream, blocks)
        self._done(len(MATRICES) + 1)

    def _begin(self, number: int, stream: Floats, blocks: Mapping[str, Blocks]) -> None:
        def rounded(place: int, stage: int, at: Floats, given: Floats) -> None:
            name = f"layers.{number}.{MATRICES[place]}.weight"
            if name in blocks:
                copy = at.copy()
                self._rest(number, stage, copy, given, {place: blocks[name]})
                self._copies.setdefault(name, []).append(copy)

        for place in range(3):
            rounded(place, OUTPUT, stream, stream)
        given = run_stage(self.engine, number, OUTPUT, stream, stream, {})
        rounded(3, GATE_UP, stream, given)
        given = run_stage(self.engine, number, GATE_UP, stream, given, {})
        for place in (4, 5):
            rounded(place, DOWN, stream, given)
        given = run_stage(self.engine, number, DOWN, stream, given, {})
        rounded(6, END, stream, given)
        run_stage(self.engine, number, END, stream, given, {})

    def _rest(
        self, number: int, first: int, stream: Floats, given: Floats, blocks: Mapping[int, Blocks]
    ) -> None:
        for stage in range(first, END + 1):
            given = run_stage(self.engine, number, stage, stream, given, blocks)

    def losses(self, head: Mapping[str, Blocks]) -> dict[str, float]:
        """What rounding each matrix alone does to the answers: mean KL divergence from the
        source's, nats; of other heads than a language model's the squared relative error. HEAD:
        the output matrix and what it is rounded to, by name."""
        names = [*self._copies, *(name for name in head if name not in self._copies)]
        total, size = np.zeros(len(names)), 0.0
        for i in range(len(self._base)):
            hidden = [self._hidden(self._copies.get(name, self._base)[i]) for name in names]
            base = self._hidden(self._base[i])
            count = max(1, BLOCK_LOGITS // (self.engine.config.n_outputs * (len(names) + 1)))
            for at in range(0, len(base), count):
                rows = slice(at, at + count)
                right = answers(self.engine, base[rows], threads=self.threads)
                size += self._size(right)
                others = answers(self.engine, np.concatenate([x[rows] for x in hidden]),
                                 threads=self.threads)  # fmt: skip
                for j, name in enumerate(names):
                    n = len(right)
                    ours = others[j * n : (j + 1) * n]
                    if name in head:
                        ours = answers(self.engine, hidden[j][rows], head[name], self.threads)
                    total[j] += self._distance(right, ours)
        return {name: float(f"{x:.4g}") for name, x in zip(names, total / (size or 1), strict=True)}

    def _hidden(self, stream: Floats) -> Floats:
        """What the head reads, (n, dim)."""
        return run_stage(self.engine, self.engine.config.n_layers - 1, HEAD, stream, stream, {})

    def _size(self, right: Floats) -> float:
        """What a sum of distances is divided by."""
        if self.engine.config.head == Head.LM:
            return float(len(right))
        return float(np.square(right, dtype=np.float64).sum())

    def _distance(self, right: Floats, ours: Floats) -> float:
        if self.engine.config.head == Head.LM:
            return float(near_divergence(right, ours).sum())
        return float(np.square(ours - right, dtype=np.float64).sum())


def answers(
    engine: Engine, hidden: Floats, blocks: Blocks | None = None, threads: int | None = None
) -> Floats:
    """What the head, its matrix that of the model or BLOCKS, gives for HIDDEN (n, dim), in f32."""
    model, c = engine.model, engine.config
    if c.head == Head.NONE:
        return hidden
    names = [tensor.name for tensor in model.tensors]
    index = names.index("tok_embeddings.weight" if c.tied else "output.weight")
    found = multiply(model, index, hidden, blocks=blocks, threads=threads)
    return found + model.rows(names.index("output.bias")) if c.output_bias else found


def near_divergence(right: Floats, ours: Floats) -> NDArray[np.float64]:
    """KL(p || q) of each row of logits, nats, where both are near each other: with d = ours -
    right less its mean under p, log of the mean under p of exp(d), in float32 throughout."""
    p = np.exp(right - right.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    d = ours - right
    d -= np.einsum("ij,ij->i", p, d)[:, None]
    e = np.exp(d)
    e -= 1
    e -= d  # its mean under p is the variance's half and what follows
    kl: NDArray[np.float64] = np.log1p(np.maximum(np.einsum("ij,ij->i", p, e), 0, dtype=np.float64))
    return kl


def scaled(loss: float, error: float, others: float) -> float:
    """What a tensor that loses LOSS with the squared error ERROR loses with OTHERS: as much less
    as it is smaller. Errors are relative, each input's its own: some inputs are huge, and what
    they yield hardly counts for it (stories15M's w2 by plain sums: three times too much)."""
    return loss * others / error if error > 0 and math.isfinite(loss) else 0.0
