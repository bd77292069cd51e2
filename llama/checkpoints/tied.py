"""Whether the output matrix is the embedding once more, so that it is stored once.

Llama 3.2's small models are tied, but Meta's files and some of Hugging Face's hold both. They are
compared a chunk of rows at a time, to the bit, up to the first difference: the memory is bounded,
and a model that is not tied costs one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llama.checkpoints.checkpoint import Checkpoint
from llama.checkpoints.tensors import Tensor, Unreadable
from llama.errors import LlamaError
from llama.quant import widen

INPUT, OUTPUT = "tok_embeddings.weight", "output.weight"
CHUNK_BYTES = 1 << 24


def store_once(checkpoint: Checkpoint, progress: Callable[[int, int], object]) -> None:
    """Ties a checkpoint that holds both matrices alike; PROGRESS hears (rows done, all rows).

    LlamaError where the source calls them tied and they differ: versions of transformers disagree
    which of the two then counts.
    """
    tensors = dict(checkpoint.tensors)
    pair = [tensors[name] for name in (INPUT, OUTPUT) if name in tensors]
    whole = all(len(each.shape) == 2 and not isinstance(each, Unreadable) for each in pair)
    if len(pair) < 2 or not whole or pair[0].shape != pair[1].shape or 0 in pair[0].shape:
        return  # nothing to compare, or Checkpoint.check says what is wrong
    names = [checkpoint.own_names.get(name, name) for name in (OUTPUT, INPUT)]
    if same(pair[0], pair[1], progress):
        del tensors[OUTPUT]
        checkpoint.tensors = tensors
        checkpoint.config = replace(checkpoint.config, tied=True)
        checkpoint.notes.append(f"{names[0]} is {names[1]} once more: stored once (tied)")
    elif checkpoint.config.tied:
        raise LlamaError(
            f"{checkpoint.path}: tie_word_embeddings is true, but {names[0]} differs from "
            f"{names[1]}; say false in config.json to keep both, or take {names[0]} out"
        )
    elif checkpoint.tied_as_published:
        checkpoint.notes.append(
            f"{names[0]} differs from {names[1]}, other than in the published model: both are kept"
        )


def same(a: Tensor, b: Tensor, progress: Callable[[int, int], object]) -> bool:
    """Whether two matrices of one shape hold the same numbers, bit for bit as float32."""
    rows, columns = a.shape
    step = max(CHUNK_BYTES // (4 * columns), 1)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        left, right = (np.ascontiguousarray(widen(each.rows(first, last))) for each in (a, b))
        equal = np.array_equal(left.view(np.uint32), right.view(np.uint32))
        del left, right
        if not equal:
            return False
        progress(last, rows)
    return True
