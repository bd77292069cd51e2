"""What the engine's own rounding adds: a file's answers beside those of exact arithmetic.

The same weights, decoded to float32, meet inputs that are not rounded to codes, and keys and
values stay float32. Decoded weights are there for one stage of a layer at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from llama.calibrate import STAGES
from llama.distance import PAGE_NAME, Deviation, Distance, compare, outputs, page
from llama.engine import Engine, Floats
from llama.quant import Kind, matrix_bytes
from llama.sensitivity import MATRICES, answers
from llama.stages import END, HEAD, Blocks, aligned, run_stage


def rounding(
    path: str | os.PathLike[str], threads: int | None = None
) -> tuple[Distance | Deviation, int]:
    """How far the engine, with its default session, is from exact arithmetic on the page; and the
    bits of its activations."""
    with Engine(path, threads=threads, max_seq_len=512) as engine:
        ids = page(engine)
        with Engine(path, threads=threads, max_seq_len=512, kv="f32") as other:
            hidden = _hidden(other, ids, threads)

            def pairs() -> Iterator[list[Floats]]:
                for at, (ours,) in outputs([engine], ids, 0, len(ids)):
                    yield [answers(other, hidden[at : at + len(ours)], threads=threads), ours]

            found = compare(pairs(), engine.config.head, len(ids), PAGE_NAME)
        return found, engine.info().activations


def _hidden(engine: Engine, ids: list[int], threads: int | None) -> Floats:
    """What the head reads, (n, dim), in exact arithmetic."""
    model, n_layers = engine.model, engine.config.n_layers
    places = {tensor.name: i for i, tensor in enumerate(model.tensors)}
    embedding = places["tok_embeddings.weight"]
    stream = np.stack([model.rows(embedding, token, 1)[0] for token in ids])
    for layer in range(n_layers):
        given = stream
        for stage in range(1, END + 1):
            decoded = {  # the matrices that were next after the stage before
                MATRICES.index(name): _decoded(
                    engine, places[f"layers.{layer}.{name}.weight"], threads
                )
                for name in STAGES[stage - 1]
            }
            given = run_stage(engine, layer, stage, stream, given, decoded)
    return run_stage(engine, n_layers - 1, HEAD, stream, stream, {})


def _decoded(engine: Engine, index: int, threads: int | None) -> Blocks:
    rows, columns = engine.model.tensors[index].shape
    size = matrix_bytes(Kind.F32, rows, columns)
    blocks = aligned(size)
    blocks[:] = np.frombuffer(
        engine.model.quantize(index, 0, rows, Kind.F32, size, threads)[0], np.uint8
    )
    return Kind.F32, blocks
