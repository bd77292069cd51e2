"""What the model's matrices are multiplied with: the model run on texts, layer by layer.

The inputs of a matrix say which of its rounding errors matter. Each layer goes through five
stages; between two of them the matrices that are next are encoded with what their inputs' second
moments say, and from then on stand in for the model's own, so that a matrix makes up for what those
before it lost. Memory holds one layer's inputs and one square of moments, whatever the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llama.config import Head
from llama.engine import Engine, Floats, Model
from llama.errors import LlamaError
from llama.quant import GROUP
from llama.sampling import SamplingParams
from llama.stages import END, HEAD, Blocks, add_moments, factor_moments, run_stage
from llama.tokenizer import open_tokenizer

# Of the mean diagonal. GPTQ has 0.01 (arXiv:2210.17323, section 3.3) and 128 texts of 2,048 tokens;
# with a thirtieth of that, as much as this keeps from learning the texts' own chance, and costs
# nothing on more of their kind (docs/performance.md).
DAMPING = 0.3
TEXT = 512  # tokens of one text at most
SLOTS = 16  # texts that the model writes at once
# What is encoded after each stage, in the order of llama_stage's blocks.
STAGES = (("attention.wq", "attention.wk", "attention.wv"), ("attention.wo",),
          ("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",))  # fmt: skip
SAMPLE = 256  # inputs on which the products of encoded matrices are measured
# a matrix's name, its factor, and some of its inputs (n, columns) -> its blocks
Encode = Callable[[str, Floats, Floats], Blocks]


# ---- texts


def texts_of(
    source: str | os.PathLike[str], n_tokens: int, file: Path | None = None,
    threads: int | None = None, wrote: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:  # fmt: skip
    """About N_TOKENS token ids in texts of at most TEXT, each with its begin token: of FILE, or
    that the model writes by itself; WROTE hears of each token that it does. A network without a
    language model's head cannot write: then there are none."""
    with Model(source) as model:
        if file is not None:
            return _read(model, n_tokens, file)
        if model.config.head != Head.LM:
            return []
    with Engine(source, threads=threads) as engine:
        return _write(engine, n_tokens, wrote)


def _read(model: Model, n_tokens: int, file: Path) -> list[list[int]]:
    """Pieces of FILE, from its beginning to its end with equal gaps."""
    c = model.config
    tokenizer = open_tokenizer(*model.tokenizer, c.vocab_size, c.bos_id, c.eos_ids, model.meta)
    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise LlamaError(f"{file}: cannot read: {error.strerror}") from None
    length = min(TEXT, c.max_seq_len)
    count = -(-n_tokens // length)
    if len(text) <= 8 * n_tokens:  # characters; a token has 3 to 5 of most texts
        ids, body = tokenizer.encode(text, bos=False), length - (c.bos_id is not None)
        pieces = [ids[at : at + body] for at in range(0, len(ids), body)][:count]
    else:
        starts = [len(text) * i // count for i in range(count)]
        pieces = [tokenizer.encode(text[at : at + 8 * length], bos=False) for at in starts]
    begin = [] if c.bos_id is None else [c.bos_id]
    texts = [(begin + piece)[:length] for piece in pieces if piece]
    if not texts:
        raise LlamaError(f"{file}: there is no text in it to calibrate with")
    return texts


def _write(engine: Engine, n_tokens: int, wrote: Callable[[int], object]) -> list[list[int]]:
    """Drawn at temperature 1, so that they are spread as the model believes texts are."""
    c, params = engine.config, SamplingParams(temperature=1, top_p=1, top_k=0, seed=0)
    begin = c.bos_id if c.bos_id is not None else (*c.eos_ids, 0)[0]
    length = min(TEXT, c.max_seq_len)
    texts = [[begin] for _ in range(SLOTS)]
    slots, total = list(range(SLOTS)), SLOTS  # which text each sequence holds
    while total < n_tokens:
        rows = [texts[number] for number in slots]
        engine.forward([row[-1] for row in rows], range(SLOTS), [len(row) - 1 for row in rows],
                       [True] * SLOTS, keep=True)  # fmt: skip
        for slot, row in enumerate(rows):
            row.append(engine.sample(slot, params, (), slots[slot], len(row)))
            if row[-1] in c.eos_ids or len(row) >= length:
                engine.trim(slot, 0)
                slots[slot] = len(texts)
                texts.append([begin])
                total += 1
        total += SLOTS
        wrote(SLOTS)
    return [text for text in texts if len(text) > 1]


def hold_out(texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """TEXTS without, and only, a sixteenth of their tokens, which judges and is not learned from;
    of a single text, its end."""
    if len(texts) == 1:
        cut = len(texts[0]) - max(len(texts[0]) // 16, 1)
        return [texts[0][:cut]], [texts[0][cut:]]
    kept, out = list(texts), [texts[-1]]
    kept.pop()
    while len(kept) > 1 and 16 * sum(map(len, out)) < sum(map(len, texts)):
        out.append(kept.pop())
    return kept, out


# ---- the model, layer by layer


class Calibration:
    """A model and texts that go through it. A context manager.

    TEXTS are token ids, each read by itself from position 0. The moments, and so all that is
    encoded by them, are the same for any number of threads. ROTATED: the layers' matrices of whole
    groups are encoded in rotated kinds, so their moments are those of rotated inputs.
    """

    def __init__(
        self, source: str | os.PathLike[str], texts: Sequence[Sequence[int]],
        threads: int | None = None, rotated: bool = False,
    ) -> None:  # fmt: skip
        longest = max(map(len, texts))
        self.threads, self.rotated, self.next_layer = threads, rotated, 0
        self.engine = Engine(source, threads=threads, kv="f32", max_seq_len=longest)
        self.n_layers = self.engine.config.n_layers
        index = [t.name for t in self.engine.model.tensors].index("tok_embeddings.weight")
        rows = {
            token: self.engine.model.rows(index, token, 1)[0]
            for token in sorted({token for text in texts for token in text})
        }
        self._streams = [np.stack([rows[i] for i in text]) for text in texts]

    def close(self) -> None:
        self.engine.close()

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
            full = [f"layers.{number}.{name}.weight" for name in names]
            factor, some = self._factor(given, full[0], self.rotated), _some(given)
            for name in full:
                blocks[len(blocks)] = encode(name, factor, some)
        self._stage(number, END, given, blocks)

    def head(self, rotated: bool = False) -> tuple[Floats, Floats]:
        """The factor of the output matrix, ROTATED or not, once all layers are through, and some of
        its inputs."""
        inputs = self._stage(self.n_layers - 1, HEAD, self._streams, {})
        return self._factor(inputs, "output.weight", rotated), _some(inputs)

    def _stage(
        self, layer: int, stage: int, given: list[Floats], blocks: dict[int, Blocks]
    ) -> list[Floats]:
        pairs = zip(self._streams, given, strict=True)
        return [run_stage(self.engine, layer, stage, x, y, blocks) for x, y in pairs]

    def _factor(self, inputs: list[Floats], name: str, rotated: bool) -> Floats:
        columns = inputs[0].shape[1]
        if not all(np.isfinite(x).all() for x in inputs):
            raise LlamaError(f"{name}: calibration gives it inputs that are not finite")
        moments = np.zeros((columns, columns), np.float32)
        for x in inputs:
            add_moments(moments, x, self.threads, rotated and columns % GROUP == 0)
        factor_moments(moments, DAMPING, self.threads)
        return moments


def _some(inputs: list[Floats]) -> Floats:
    """Some of all texts' INPUTS, with equal gaps."""
    places = [(i, j) for i, x in enumerate(inputs) for j in range(len(x))]
    chosen = places[:: -(-len(places) // SAMPLE)]
    return np.stack([inputs[i][j] for i, j in chosen])
