"""Golden answers: what a model file itself says its network makes of a short prompt.

export.py and quantize.py compute them from the file that they have just written, with the scalar
kernels, and store them in it as JSON (docs/format.md, selftest.golden); selftest.py computes them
again. Each layer leaves a fingerprint: a checksum, which tells whether it is the same to the last
bit, and its size with eight random projections, which tell how far off it is where it is not.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama.config import Config
from llama.engine import Engine, Model
from llama.errors import LlamaError
from llama.format import Writer
from llama.tokenizer import Tokenizer, open_tokenizer

KEY = "selftest.golden"
# Case, contractions, digits, accents, runs of spaces, other scripts, an emoji with a joiner, code.
PROMPT = (
    "The keeper's lamp wasn't lit: 3 May 2024, 07:45.  L'été à Zürich, 東京 и Москва "
    "\N{MAN}\u200d\N{PERSONAL COMPUTER}\n\tdef mean(x): return sum(x)/len(x)"
)
MAX_IDS = 192  # of the prompt that are stored; its bytes are fewer
POSITIONS = 8  # of these go through the network,
MOST_POSITIONS = 64  # or so many at most, as another version may have chosen
PROJECTIONS = 8
TOP = 32
MAX_BYTES = 1 << 21  # of the JSON; 4,096 layers take less
Found = TypeVar("Found")


@dataclass(frozen=True)
class Layer:
    """A fingerprint of the residual stream (positions, dim) behind a layer."""

    crc32: int  # of all its float32 values
    rms: float  # of the last position's values
    # sums under random signs of all values, each position's over their rms, over the square root
    # of how many there are
    projections: tuple[float, ...]

    def distance(self, other: Layer) -> float:
        """About rms(x - y) where rms(x) is 1, 0 if all is the same to the last bit: under random
        signs the square of a sum is on average the sum of the squares."""
        if self.crc32 == other.crc32:
            return 0.0
        squares = [(a - b) ** 2 for a, b in zip(self.projections, other.projections, strict=True)]
        sizes = abs(self.rms - other.rms) / (self.rms or 1.0)
        return max(math.sqrt(sum(squares) / len(squares)), sizes)


@dataclass(frozen=True)
class Golden:
    """A prompt and what the network makes of its first tokens."""

    text: str | None  # None: the file has no tokenizer, and the ids are a pattern
    ids: tuple[int, ...]  # all of the prompt's, the begin token included
    positions: int  # how many of them went through the network
    layers: tuple[Layer, ...]  # (n_layers + 1) the embedding's first
    outputs: int  # CRC-32 of what the head gives for each position, (positions, n_outputs) float32
    top: dict[int, float]  # of the last position the TOP largest: {index: value}, largest first
    source: dict[int, float] = field(default_factory=dict)  # of a quantised file: the source's top
    # all (n_outputs) of the last position where they were computed here; they are not stored
    last: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32), repr=False)

    def json(self) -> str:
        layers = [[one.crc32, one.rms, *one.projections] for one in self.layers]
        entry = {
            "text": self.text, "ids": self.ids, "positions": self.positions, "layers": layers,
            "outputs": self.outputs, "top": list(self.top.items()),
            "source": list(self.source.items()),
        }  # fmt: skip
        return json.dumps(entry, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# --- computed


def prompt_of(model: Model) -> tuple[str | None, tuple[int, ...]]:
    """The text and its ids; a fixed pattern of ids where the tokenizer can make nothing of it."""
    try:
        if ids := encode(tokenizer_of(model), PROMPT):
            return PROMPT, ids
    except LlamaError:  # there is none, or a piece of the text is one of its control tokens
        pass
    size = model.config.vocab_size
    return None, tuple((7 * i + i * i) % size for i in range(POSITIONS))


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of TEXT that are stored and compared."""
    return tuple(tokenizer.encode(text, bos=True)[:MAX_IDS])


def tokenizer_of(model: Model) -> Tokenizer:
    config = model.config
    return open_tokenizer(
        *model.tokenizer, config.vocab_size, config.bos_id, config.eos_ids, model.meta
    )


def compute(
    path: str | os.PathLike[str], like: Golden | None = None, *, isa: str | None = "scalar",
    device: str = "cpu", threads: int | None = None,
) -> Golden:  # fmt: skip
    """The answers of the file at PATH to the prompt of LIKE, or to the standard one, with keys and
    values in f32 and activations in 16 bits. LlamaError where they are not finite."""
    with Engine(
        path, isa=isa, device=device, threads=threads, kv="f32", activations=16,
        max_seq_len=MOST_POSITIONS,
    ) as engine:  # fmt: skip
        text, ids = prompt_of(engine.model) if like is None else (like.text, like.ids)
        n = min(POSITIONS, len(ids), engine.config.max_seq_len) if like is None else like.positions
        # the last token by itself: fast kernels have other paths for a prompt than for a token;
        # the scalar ones have not, and would read every weight of a large file twice
        parts = [range(n)] if isa == "scalar" or n == 1 else [range(n - 1), range(n - 1, n)]
        traced = [
            engine.trace([ids[i] for i in part], [0] * len(part), part, [True] * len(part))
            for part in parts
        ]
    stream = np.concatenate([x for x, _ in traced], axis=1)
    outputs = np.concatenate([y for _, y in traced])
    for place, x in zip((*map(place_of, range(len(stream))), "the head"), (*stream, outputs),
                        strict=True):  # fmt: skip
        if not np.isfinite(x).all():
            raise LlamaError(f"{place} gives numbers that are not finite")
    signs = _signs(stream[0].size)
    last = outputs[-1]
    largest = np.argsort(-last, kind="stable")[:TOP]
    return Golden(
        text, ids, n, tuple(_layer(x, signs) for x in stream), _crc32(outputs),
        {int(i): _short(last[i]) for i in largest}, last=last,
    )  # fmt: skip


def place_of(number: int) -> str:
    """What Golden.layers[NUMBER] is behind."""
    return f"layer {number - 1}" if number else "the embedding"


def _layer(x: NDArray[np.float32], signs: NDArray[np.float64]) -> Layer:
    values = x.astype(np.float64)
    rms = np.sqrt((values * values).mean(axis=1))
    values /= np.where(rms, rms, 1)[:, None]
    sums = signs @ values.reshape(-1) / math.sqrt(values.size)
    return Layer(_crc32(x), float(f"{rms[-1]:.9g}"), tuple(float(f"{p:.9g}") for p in sums))


def _crc32(x: NDArray[np.float32]) -> int:
    return zlib.crc32(np.ascontiguousarray(x, "<f4").data)


def _short(x: np.float32) -> float:
    """The fewest digits that are this float32 and no other."""
    return float(np.format_float_scientific(x))


def _signs(n: int) -> NDArray[np.float64]:
    """(PROJECTIONS, n) of 1 and -1: bit j of SplitMix64's output number i, 1 for a set bit."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bits = z >> np.arange(PROJECTIONS, dtype=np.uint64)[:, None] & np.uint64(1)
    signs: NDArray[np.float64] = bits.astype(np.float64) * 2 - 1
    return signs


# --- written


def room(config: Config) -> str:
    """As much space as the JSON may take for a model of this shape."""
    number = 18  # bytes: "-1.17549435e-38" and what stands around it
    numbers = MAX_IDS + (config.n_layers + 1) * (2 + PROJECTIONS) + 4 * TOP + 2
    return " " * (256 + 2 * len(PROMPT.encode()) + number * numbers)


def store(
    writer: Writer, source: str | os.PathLike[str] | None = None, threads: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> None:  # fmt: skip
    """Seals WRITER's file, whose meta reserved room() under KEY, computes its answers and writes
    them there; of a quantised file also what its SOURCE says. Without them it is a good file too:
    SAY hears why they cannot be computed."""

    def work() -> Golden:
        golden = compute(writer.temporary, threads=threads)
        top = {} if source is None else _top_of(source, golden, threads)
        return replace(golden, source=top)

    writer.seal()
    try:
        golden = patiently(work, "computing what run.py --selftest will compare")
    except LlamaError as error:
        say(f"  nothing is stored for run.py --selftest: {error}")
        return
    writer.set_text(KEY, golden.json())


def _top_of(
    source: str | os.PathLike[str], golden: Golden, threads: int | None
) -> dict[int, float]:
    """What SOURCE has stored for the same prompt, else computed now."""
    with Model(source) as model:
        try:
            known = load(model.meta, model.config)
        except LlamaError:
            known = None
    if known is None or (known.ids, known.positions) != (golden.ids, golden.positions):
        known = compute(source, golden, threads=threads)
    return known.top


def patiently(work: Callable[[], Found], what: str) -> Found:
    """WORK's result; WHAT and the time it takes are shown at a terminal. Ctrl-C is heard at once:
    C code cannot be interrupted, so it goes on in a thread that nobody waits for."""
    from tqdm import tqdm

    found: list[Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    form = "{desc} {elapsed}"
    with tqdm(desc=what, bar_format=form, leave=False, disable=None, delay=0.5) as bar:
        while thread.is_alive():
            thread.join(0.1)
            bar.update()
    if failed:
        raise failed[0]
    return found[0]


# --- read; the file may come from anyone


def load(meta: Mapping[str, Any], config: Config) -> Golden | None:
    """The golden answers that META holds, None if there are none. LlamaError where they cannot be
    those of a model of this shape."""
    text = meta.get(KEY, "")
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        raise LlamaError(f"{KEY}: expected at most {MAX_BYTES} bytes of text")
    if not text.strip():
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LlamaError(f"{KEY}: no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise LlamaError(f"{KEY}: expected a JSON object, found {type(entry).__name__}")
    words = entry.get("text")
    if not (words is None or (isinstance(words, str) and 0 < len(words) <= 4096)):
        raise LlamaError(f"{KEY}: text: expected 1 to 4096 characters or null")
    ids = [_integer("ids", token, config.vocab_size) for token in _list(entry, "ids", 1, MAX_IDS)]
    layers = _list(entry, "layers", config.n_layers + 1, config.n_layers + 1)
    positions = _integer("positions", entry.get("positions"), MOST_POSITIONS + 1)
    if not 0 < positions <= len(ids):
        raise LlamaError(f"{KEY}: positions: expected 1 to {len(ids)}, found {positions}")
    return Golden(
        words, tuple(ids), positions, tuple(_read_layer(one) for one in layers),
        _integer("outputs", entry.get("outputs"), 2**32),
        _read_top(entry, "top", 1, config.n_outputs),
        _read_top(entry, "source", 0, config.n_outputs),
    )  # fmt: skip


def _list(entry: Mapping[str, Any], name: str, least: int, most: int) -> Sequence[Any]:
    found = entry.get(name)
    if not isinstance(found, list) or not least <= len(found) <= most:
        raise LlamaError(f"{KEY}: {name}: expected a list of {least} to {most}")
    return found


def _integer(name: str, value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise LlamaError(f"{KEY}: {name}: expected whole numbers below {limit}")
    return value


def _number(name: str, value: Any) -> float:
    # beyond float32 no network has it, and its square would be no float
    if type(value) not in (int, float) or not abs(value) <= 3.5e38:
        raise LlamaError(f"{KEY}: {name}: expected float32 numbers")
    return float(value)


def _read_layer(entry: Any) -> Layer:
    if not isinstance(entry, list) or len(entry) != 2 + PROJECTIONS:
        raise LlamaError(f"{KEY}: layers: expected lists of {2 + PROJECTIONS} numbers")
    crc32, *numbers = entry
    rms, *projections = (_number("layers", number) for number in numbers)
    return Layer(_integer("layers", crc32, 2**32), rms, tuple(projections))


def _read_top(entry: Mapping[str, Any], name: str, least: int, limit: int) -> dict[int, float]:
    top: dict[int, float] = {}
    for pair in _list(entry, name, least, TOP):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LlamaError(f"{KEY}: {name}: expected pairs of an index and a value")
        top[_integer(name, pair[0], limit)] = _number(name, pair[1])
    return top
