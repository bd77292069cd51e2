"""The 4- and 8-bit kinds of a model beside llama.cpp's, as docs/performance.md has them.

Every matrix, the embedding too, goes into the one kind and back to f32, and what such a file says
is compared with what the source says: only the weights' rounding differs. Calibrated means, for
ours, error feedback, for llama.cpp's an importance matrix, of the same texts. Its kinds are made
by its own quantiser (pip install xllamacpp); rows that are no whole blocks are padded with zeros.

    python3 tests/compare_kinds.py bin/stories15M.bin --text stories.txt --context 256
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama import Llama
from llama.calibrate import STAGES, Calibration, texts_of
from llama.config import Config
from llama.distance import log_softmax, outputs
from llama.engine import Engine, Floats, Model
from llama.eval import Totals, perplexity, windows
from llama.format import Record, TokenizerKind, Writer
from llama.peers import load_llama_cpp
from llama.quant import GROUP, Kind, untile
from llama.shrink import Encoder
from llama.stages import Blocks
from llama.variants import Losses, levelled

Matrices = dict[str, Floats]
THEIRS = ("Q8_0", "Q4_K", "IQ4_NL", "Q4_0", "Q4_1")
EMBEDDING = "tok_embeddings.weight"


class Watched(Calibration):
    """Notes how large the inputs of each matrix are: sums of squares by column."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.squares: dict[str, NDArray[np.float64]] = {}

    def _factor(self, inputs: list[Floats], name: str, rotated: bool) -> Floats:
        squares = sum(np.square(x, dtype=np.float64).sum(axis=0) for x in inputs)
        stage = next((few for few in STAGES if few[0] in name), (name,))
        for other in stage:
            self.squares[name.replace(stage[0], other)] = np.asarray(squares)
        return super()._factor(inputs, name, rotated)


def importance(model: Model, texts: list[list[int]]) -> dict[str, NDArray[np.float64]]:
    encoder = Encoder(model, None, lambda n: None)

    def same(name: str, factor: Floats, inputs: Floats) -> Blocks:
        return encoder.whole(name, encoder.tensors[name].kind)

    with Watched(model.path, texts) as calibration:
        for _ in range(calibration.n_layers):
            calibration.layer(same)
        calibration.head()
        found = calibration.squares
    if model.config.tied:
        found[EMBEDDING] = found.pop("output.weight")
    return found


def ours(model: Model, kind: Kind | None, texts: list[list[int]] | None) -> Matrices:
    """KIND None: q4 or q4e, whichever quantize.py would take for a matrix."""
    encoder = Encoder(model, None, lambda n: None)
    records = [Record(t.name, kind or Kind.Q4, t.shape) for t in model.tensors if t.shape[1:]]
    chosen = records if kind else levelled(Losses(model, None), records)
    kinds = {record.name: record.kind for record in chosen}
    found: Matrices = {}

    def encode(name: str, factor: Floats | None, inputs: Floats | None) -> Blocks:
        kind = kinds[name]
        blocks = encoder.whole(name, kind, factor)
        found[name] = untile(blocks[1], kind, *encoder.tensors[name].shape)
        return blocks

    if texts is not None:
        rotated = kind is not None and kind.rotated
        with Calibration(model.path, texts, None, rotated) as calibration:
            for _ in range(calibration.n_layers):
                calibration.layer(encode)
            encode(EMBEDDING if model.config.tied else "output.weight", *calibration.head(rotated))
    for tensor in model.tensors:
        if len(tensor.shape) == 2 and tensor.name not in found:
            encode(tensor.name, None, None)
    return found


def theirs(
    model: Model, name: str, weights: dict[str, NDArray[np.float64]] | None
) -> Matrices:
    library, type_ = load_llama_cpp()[0], gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    found: Matrices = {}
    for index, tensor in enumerate(model.tensors):
        if len(tensor.shape) == 1:
            continue
        rows, columns = tensor.shape
        pad = -columns % block
        values = np.ascontiguousarray(np.pad(model.rows(index), ((0, 0), (0, pad))), np.float32)
        matter = None if weights is None else weights.get(tensor.name, np.ones(columns))
        if matter is not None:
            matter = np.pad(matter, (0, pad), constant_values=matter.min()).astype(np.float32)
        out = np.empty((rows, (columns + pad) // block * size), np.uint8)
        library.ggml_quantize_chunk(
            int(type_), values.ctypes.data, out.ctypes.data, 0, rows, columns + pad,
            None if matter is None else matter.ctypes.data,
        )  # fmt: skip
        found[tensor.name] = gguf.quants.dequantize(out, type_)[:, :columns]
    return found


def candidates(
    model: Model, texts: list[list[int]]
) -> Iterator[tuple[str, float, Callable[[], Matrices]]]:
    """Names, bits a weight, and how to make them."""
    weights = importance(model, texts)
    whole = all(t.shape[1] % GROUP == 0 for t in model.tensors if len(t.shape) == 2)
    halves = {t.name: model.rows(i).astype(np.float16).astype(np.float32)
              for i, t in enumerate(model.tensors) if len(t.shape) == 2}  # fmt: skip
    yield "f16", 16, lambda: halves
    for kind in (Kind.Q8, Kind.Q8R) if whole else (Kind.Q8,):
        yield kind.label, 8.5, lambda k=kind: ours(model, k, None)
    yield "Q8_0", 8.5, lambda: theirs(model, "Q8_0", None)
    for learned in (None, texts):
        for four in (Kind.Q4, Kind.Q4E, None, *[Kind.Q4R] * whole):
            more = ", calibrated" if learned else ""
            name = four.label if four else "q4 or q4e"
            yield name + more, 4.5, lambda k=four, t=learned: ours(model, k, t)
        for name in THEIRS[1:]:
            more, few = (", importance matrix", weights) if learned else ("", None)
            bits = 5.0 if name == "Q4_1" else 4.5
            yield name + more, bits, lambda n=name, w=few: theirs(model, n, w)


def write(model: Model, matrices: Matrices, out: Path) -> None:
    shape = Config(**{name: getattr(model.config, name) for name in Config.__match_args__})
    name, data = model.tokenizer
    records = [Record(t.name, Kind.F32, t.shape) for t in model.tensors]
    with Writer(out, shape, records, tokenizer=(TokenizerKind[name.upper()], data),
                meta=model.meta, force=True) as writer:  # fmt: skip
        for i, record in enumerate(records):
            writer.write(record.name, matrices.get(record.name, model.rows(i)))


def compare(reference: Path, others: list[Path], ids: list[int], context: int) -> list[Totals]:
    """Each of OTHERS against REFERENCE, on windows of IDS side by side: the reference, which is as
    much work as each of them, answers once for all."""
    found = list(windows("papers", ids, context, None))
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(path, max_seq_len=context, kv="f32"))
                   for path in [*others, reference]]  # fmt: skip
        totals = [Totals(sum(window.scored for window in found), 2) for _ in others]
        for window in tqdm(found, "windows", disable=None):
            for at, logits in outputs(engines, window.ids, 0, len(window.ids) - 1):
                right = log_softmax(logits.pop())
                came = window.ids[at + 1 : at + 1 + len(right)]
                for total, ours in zip(totals, logits, strict=True):
                    total.add([log_softmax(ours), right], came)
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bin", type=Path, help="an f32 model")
    parser.add_argument("--text", type=Path, required=True, help="what is predicted")
    parser.add_argument("--calibrate", type=Path, help="default: what the model writes by itself")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--only", default="", help="kinds whose names begin with one of these, ...")
    args = parser.parse_args()
    wanted = tuple(args.only.split(","))
    with Model(args.bin) as model, tempfile.TemporaryDirectory(dir=args.bin.parent) as folder:
        texts = texts_of(args.bin, 8192, args.calibrate)
        kinds, files = [], []
        for name, bits, make in candidates(model, texts):
            if name.startswith(wanted):
                kinds.append((name, bits))
                files.append(Path(folder) / f"{len(files)}.bin")
                write(model, make(), files[-1])
                print(name, file=sys.stderr)
        with Llama(args.bin) as llm:
            ids = llm.tokenizer.encode(args.text.read_text("utf-8"), bos=True)
        ids = ids[: -(-args.tokens // (args.context - 1)) * args.context]
        print("| kind | bits a weight | perplexity | mean KL | 99th percentile | same token |")
        print("|---|---|---|---|---|---|")
        totals = compare(args.bin, files, ids, args.context)
        for (name, bits), total in zip(kinds, totals, strict=True):
            found = total.comparison()
            print(f"| {name} | {bits} | {perplexity(total.surprise[0]).value:.4f} "
                  f"| {found.kl.value:.3e} | {found.kl_99:.2e} | {found.same_token.value:.2%} |")
        print(f"f32: perplexity {perplexity(total.surprise[1]).value:.4f}, {total.n} tokens scored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
