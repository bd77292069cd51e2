"""What the model's matrices are multiplied with: the model run on texts, layer by layer.

The inputs of a matrix say which of its rounding errors matter. Each layer goes through five
stages; between two of them the matrices that are next are encoded with what their inputs' second
moments say, and from then on stand in for the model's own, so that a matrix makes up for what those
before it lost. Memory holds one layer's inputs and one square of moments, whatever the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llama.engine import Engine, Floats, Model, add_moments, factor_moments
from llama.errors import LlamaError
from llama.quant import Kind
from llama.sampling import SamplingParams

DAMPING = 0.01  # of the mean diagonal, as in GPTQ (arXiv:2210.17323, section 3.3)
TEXT = 512  # tokens of one text at most
SLOTS = 16  # texts that the model writes at once
STAGES = (("attention.wq", "attention.wk", "attention.wv"), ("attention.wo",),
          ("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",))  # fmt: skip
PLACES = tuple(name for stage in STAGES for name in stage)
HEAD = 5  # the stage of the output matrix
Blocks = tuple[Kind, NDArray[np.uint8]]
Encode = Callable[[str, Floats], Blocks]  # a matrix's name and factor -> its blocks


class Calibration:
    """A model and texts that go through it. A context manager.

    TEXTS are token ids, each read by itself from position 0. The moments, and so all that is
    encoded by them, are the same for any number of threads.
    """

    def __init__(
        self, source: str | os.PathLike[str], texts: Sequence[Sequence[int]],
        threads: int | None = None,
    ) -> None:  # fmt: skip
        texts = [text for text in texts if text]
        if not texts:
            raise LlamaError("calibration: there is no text")
        longest = max(map(len, texts))
        self.threads, self.next_layer = threads, 0
        self._engine = Engine(source, threads=threads, kv="f32", max_seq_len=longest)
        self.n_layers = self._engine.config.n_layers
        index = [t.name for t in self._engine.model.tensors].index("tok_embeddings.weight")
        rows = {i: self._engine.model.rows(index, i, 1)[0] for i in {*sum(map(list, texts), [])}}
        self._streams = [np.stack([rows[i] for i in text]) for text in texts]

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def layer(self, encode: Encode) -> None:
        """The next layer: ENCODE is called for each of its matrices, which are used from there."""
        number, self.next_layer = self.next_layer, self.next_layer + 1
        blocks: dict[int, Blocks] = {}
        given = self._streams  # stands for nothing in the first stage
        for stage, names in enumerate(STAGES):
            given = self._stage(number, stage, given, blocks)
            factor = self._factor(given)
            for name in names:
                full = f"layers.{number}.{name}.weight"
                blocks[PLACES.index(name)] = encode(full, factor)
        self._stage(number, len(STAGES), given, blocks)

    def head(self) -> Floats:
        """The factor of the output matrix, once all layers are through."""
        return self._factor(self._stage(self.n_layers - 1, HEAD, self._streams, {}))

    def _stage(
        self, layer: int, stage: int, given: list[Floats], blocks: dict[int, Blocks]
    ) -> list[Floats]:
        pairs = zip(self._streams, given, strict=True)
        return [self._engine.run_stage(layer, stage, x, y, blocks) for x, y in pairs]

    def _factor(self, inputs: list[Floats]) -> Floats:
        columns = inputs[0].shape[1]
        moments = np.zeros((columns, columns), np.float32)
        for x in inputs:
            add_moments(moments, x, self.threads)
        factor_moments(moments, DAMPING, self.threads)
        return moments
