"""An open .bin and its sequences: numbers in, numbers out.

The only file that touches the C library. It owns the handles, turns arrays into pointers and
back, and refuses to be used after close(). lib/llama.h is the manual of what each call does.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama._lib import Progress, as_callback, check, ffi, lib
from llama.config import ROPE_COUNTS, Head, Rope
from llama.errors import LlamaError
from llama.facts import Config, Loss, SessionInfo, Tensor
from llama.memory import Plan, free
from llama.quant import Kind
from llama.sampling import SamplingParams

TOKENIZERS = {0: "none", 1: "sentencepiece", 2: "json", 3: "tiktoken"}
MAX_SEQUENCES: int = lib.LLAMA_MAX_SEQUENCES
NUMBERS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_p",
           "min_p", "typical_p", "mirostat_tau", "mirostat_eta")  # fmt: skip
Floats: TypeAlias = NDArray[np.float32]
Mu: TypeAlias = "array[float]"  # mirostat's number, of length 1


def isa_names() -> list[str]:
    """The CPU kernel sets that this build and CPU can run, best first."""
    names: list[str] = []
    while (name := lib.llama_isa_name(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


def measure_bandwidth(threads: int | None = None) -> float:
    """This machine's read bandwidth in bytes a second; takes a fraction of a second."""
    rate = ffi.new("double *")
    check(lib.llama_measure_bandwidth(threads or 0, 0, rate))
    return float(rate[0])


class Model:
    """An open .bin: its shape, tensors and texts, without a device. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        name = os.fsencode(path)
        if b"\0" in name:
            raise LlamaError(f"{os.fsdecode(name)!r}: a file's name cannot hold a null character")
        handle = ffi.new("llama_model **")
        check(lib.llama_open(name, handle))
        self._handle = ffi.gc(handle[0], lib.llama_close)

    @property
    def handle(self) -> Any:
        """What the library calls this model; it stays open for whoever holds this."""
        handle = self._handle
        if handle is None:
            raise LlamaError(f"{self.path}: used after close()")
        return handle

    def close(self) -> None:
        """Frees it, or leaves that to the last call that another thread is in."""
        self._handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> Config:
        c = ffi.new("llama_config *")
        check(lib.llama_get_config(self.handle, c))
        scaling = Rope(c.rope_scaling)
        table = sum(t.bytes for t in self.tensors if t.name == "tok_embeddings.weight")
        return Config(
            vocab_size=c.vocab_size, dim=c.dim, hidden_dim=c.hidden_dim, head_dim=c.head_dim,
            n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads,
            max_seq_len=c.max_seq_len, norm_eps=c.norm_eps, rope_theta=c.rope_theta,
            rope_scaling=scaling, rope_numbers=tuple(c.rope_numbers)[: ROPE_COUNTS[scaling]],
            tied=bool(c.tied), attention_bias=bool(c.attention_bias),
            mlp_bias=bool(c.mlp_bias), bos_id=None if c.bos_id < 0 else c.bos_id,
            eos_ids=tuple(c.eos_ids)[: c.n_eos], head=Head(c.head),
            n_labels=c.n_outputs if c.head >= Head.SEQUENCE else 0,
            output_bias=bool(c.output_bias),
            dtype=Kind(c.kind).label, file_bytes=c.file_bytes, weight_bytes=c.weight_bytes,
            step_bytes=c.weight_bytes - (0 if c.tied else table),  # tied: the output matrix too
        )  # fmt: skip

    @property
    def meta(self) -> dict[str, int | float | str | bytes]:
        """The file's key-value section."""
        entries: dict[str, int | float | str | bytes] = {}
        m, handle = ffi.new("llama_meta *"), self.handle
        for i in range(lib.llama_count_meta(handle)):
            check(lib.llama_get_meta(handle, i, m))
            key = ffi.string(m.key).decode("ascii")
            if m.type == lib.LLAMA_META_INT:
                entries[key] = int(m.integer)
            elif m.type == lib.LLAMA_META_FLOAT:
                entries[key] = float(m.number)
            elif m.type in (lib.LLAMA_META_TEXT, lib.LLAMA_META_BYTES):
                data = bytes(ffi.buffer(m.bytes, m.n_bytes))
                entries[key] = (
                    data.decode("utf-8", "replace") if m.type == lib.LLAMA_META_TEXT else data
                )  # a type beyond these is of a later version
        self._check_file()
        return entries

    @property
    def tokenizer(self) -> tuple[str, bytes]:
        """("none" | "sentencepiece" | "json" | "tiktoken", its file's bytes)"""
        data, n, handle = ffi.new("const uint8_t **"), ffi.new("size_t *"), self.handle
        kind = lib.llama_get_tokenizer(handle, data, n)
        if kind < 0:
            check(kind)
        text = bytes(ffi.buffer(data[0], n[0])) if n[0] else b""
        self._check_file()
        return TOKENIZERS[kind], text

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of the file up to its tensor data: it holds the checksum of every tensor, so no
        two models have the same."""
        data, n, handle = ffi.new("const uint8_t **"), ffi.new("size_t *"), self.handle
        check(lib.llama_get_header(handle, data, n))
        found = hashlib.sha256(ffi.buffer(data[0], n[0])).digest()
        self._check_file()
        return found

    def _check_file(self) -> None:
        """LlamaError where what was read of the file may be zeros, as it was cut short."""
        check(lib.llama_get_config(self.handle, ffi.new("llama_config *")))

    @property
    def tensors(self) -> list[Tensor]:
        found = [self._tensor(i) for i in range(lib.llama_count_tensors(self.handle))]
        self._check_file()
        return found

    def _tensor(self, index: int) -> Tensor:
        t, handle = ffi.new("llama_tensor *"), self.handle
        check(lib.llama_get_tensor(handle, index, t))
        shape = tuple(int(n) for n in t.shape)[: t.n_dims]
        name = ffi.string(t.name).decode("ascii")
        return Tensor(name, Kind(t.kind), shape, int(t.bytes), int(t.crc32))

    def verify(self, index: int) -> None:
        """Reads tensor INDEX whole; LlamaError if its checksum is not the recorded one."""
        check(lib.llama_verify(self.handle, _within("tensor", index)))

    def rows(self, index: int, first: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Rows [first, first + n) of tensor INDEX as float32, (n, columns) or (n,)."""
        last = lib.llama_count_tensors(self.handle) - 1
        shape = self._tensor(_within("tensor", index, last)).shape
        _within("first row", first, shape[0])
        n = shape[0] - first if n is None else _within("number of rows", n, shape[0] - first)
        out = np.empty((n, *shape[1:]), np.float32)
        check(lib.llama_read_rows(self.handle, index, first, len(out),
                                  ffi.from_buffer("float[]", out)))  # fmt: skip
        return out

    def quantize(
        self, index: int, first: int, n: int, kind: Kind, n_bytes: int,
        threads: int | None = None, factor: Floats | None = None,
    ) -> tuple[bytearray, Loss]:  # fmt: skip
        """Rows [first, first + n) of matrix INDEX in another kind: N_BYTES of blocks. FACTOR is
        what factor_moments() left, for error feedback."""
        out, loss = bytearray(n_bytes), ffi.new("llama_loss *")
        columns = self._tensor(_within("tensor", index)).shape[-1]
        if factor is not None and factor.shape != (columns, columns):
            raise LlamaError(f"a factor of {columns} columns: found shape {factor.shape}")
        check(lib.llama_quantize(self.handle, index, first, n, int(kind),
                                 ffi.NULL if factor is None else ffi.from_buffer("float[]", factor),
                                 _threads(threads), ffi.from_buffer(out, require_writable=True),
                                 n_bytes, loss))  # fmt: skip
        return out, Loss(loss.sum_squares, loss.sum_squared_error, loss.max_error)


def _threads(count: int | None) -> int:
    """COUNT as the library takes it: None, one a core, is 0 there."""
    if count is not None and not 1 <= count <= 1024:
        raise LlamaError(f"threads is {count}, expected 1 to 1024")
    return count or 0


def _within(name: str, value: int, most: int = 2**31 - 1) -> int:
    """VALUE, if the library's own type for it can hold it."""
    if not 0 <= value <= most:
        raise LlamaError(f"{name} {value}, expected 0 to {most}")
    return value


def _int32(name: str, values: ArrayLike) -> NDArray[np.int32]:
    """Token ids and positions as the library takes them; what does not fit becomes -1."""
    wide = np.asarray(values).reshape(-1)
    if wide.size and wide.dtype.kind not in "iu":
        raise LlamaError(f"{name}: expected integers, found {wide.dtype.name}")
    return np.where((wide < 0) | (wide > 2**31 - 1), -1, wide).astype(np.int32)


def _sequence(number: int) -> int:
    return _within("sequence", number, MAX_SEQUENCES - 1)


def _ints(array: NDArray[np.int32]) -> Any:
    return ffi.from_buffer("int32_t[]", array)


def _batch(
    tokens: ArrayLike, sequences: ArrayLike, positions: ArrayLike,
    want: Sequence[bool] | NDArray[np.bool_] | None, rope_lengths: ArrayLike | None,
) -> tuple[Any, int, object]:  # fmt: skip
    """The arrays as a llama_batch, how many rows want logits, and what must live as long as it."""
    t, s = _int32("tokens", tokens), _int32("sequences", sequences)
    p = _int32("positions", positions)
    w = np.zeros(len(t), np.uint8) if want is None else np.asarray(want, np.uint8)
    r = np.zeros(len(t), np.int32) if rope_lengths is None else _int32("lengths", rope_lengths)
    if not len(t) == len(s) == len(p) == len(w) == len(r):
        raise LlamaError(
            f"forward: {len(t)} tokens, {len(s)} sequences, {len(p)} positions, {len(w)} wants,"
            f" {len(r)} rope lengths"
        )
    batch = ffi.new("llama_batch *")
    batch.n = len(t)
    # cffi pointers keep their arrays alive while these do
    pointers = _ints(t), _ints(s), _ints(p), ffi.from_buffer("uint8_t[]", w), _ints(r)
    batch.tokens, batch.sequences, batch.positions, batch.want, batch.rope_lengths = pointers
    return batch, int(np.count_nonzero(w)), pointers


class Engine:
    """A model on a device, with its KV cache. A context manager; close() frees it all.

    PATH may be an open Model, which stays open: engines on one GPU then share its weights there.
    DEVICE "auto": cuda, else cpu; `chosen` says why. GPU_LAYERS: with cuda only so many of the last
    layers, and the head, are the GPU's, and the CPU has the rest. PROGRESS(done, total) is told of
    bytes brought to the GPU; what it raises ends that. THREADS None: one a core. KV None: f32 for
    an f32 file, f16 otherwise. ACTIVATIONS: bits of what meets quantised weights, 8 or 16, which
    are twice the products. MAX_SEQ_LEN None: the model's own, or with a warning as much of it as
    the free memory holds. ISA: one of isa_names(), for tests. On the CPU one sequence of
    MAX_SEQ_LEN must fit the free memory, unless ANY_SIZE; weights that do not are a warning.
    """

    MAX_SEQUENCES = MAX_SEQUENCES

    def __init__(
        self,
        path: str | os.PathLike[str] | Model,
        *,
        threads: int | None = None,
        device: str = "cpu",
        gpu_layers: int | None = None,
        max_seq_len: int | None = None,
        kv: str | None = None,
        activations: int | None = None,
        isa: str | None = None,
        any_size: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if kv not in (None, "f32", "f16", "q8"):
            raise LlamaError(f"kv is {kv!r}, expected 'f32', 'f16' or 'q8'")
        if activations not in (None, 8, 16):
            raise LlamaError(f"activations is {activations!r}, expected 8 or 16")
        if max_seq_len is not None and not 1 <= max_seq_len <= 1 << 24:
            raise LlamaError(f"max_seq_len is {max_seq_len}, expected 1 to {1 << 24}")
        if gpu_layers is not None and device == "cpu":
            raise LlamaError("gpu_layers goes with device 'cuda' or 'auto', found 'cpu'")
        self._session: Any = None
        self._own = not isinstance(path, Model)
        self.model = path if isinstance(path, Model) else Model(path)
        options = ffi.new("llama_session_options *")
        _alive = options.isa = ffi.new("char[]", isa.encode()) if isa else ffi.NULL
        options.threads = _threads(threads)
        options.kv_kind = -1 if kv is None else int(Kind[kv.upper()])
        options.activations = activations or 0
        options.max_seq_len = max_seq_len or 0
        self.chosen: str | None = None  # how "auto" came to its device
        try:
            self.config = self.model.config
            options.host_layers = self._host_layers(gpu_layers)
            self._open(options, device, progress)
            self.plan = self._plan()
            shortened = None if any_size or max_seq_len else self.plan.shortened
            if shortened:
                options.max_seq_len = self.plan.longest
                self._open(options, self.info().device, progress)
                self.plan = self._plan()
            if not any_size:
                self.plan.check()
        except BaseException:
            self.close()
            raise
        for note in () if any_size else (shortened, self.plan.warning):
            if note:
                warnings.warn(note, stacklevel=3)
        self.meta = self.model.meta
        self.tokenizer = self.model.tokenizer
        self.max_seq_len: int = self.info().max_seq_len

    def _host_layers(self, gpu_layers: int | None) -> int:
        n_layers = self.config.n_layers
        if gpu_layers is not None and not 0 <= gpu_layers <= n_layers:
            raise LlamaError(f"gpu_layers is {gpu_layers}, expected 0 to {n_layers}, the layers "
                             f"of {self.model.path}")  # fmt: skip
        return 0 if gpu_layers is None else n_layers - gpu_layers

    def _open(self, options: Any, device: str, progress: Progress | None) -> None:
        if device == "auto":
            try:
                self._open(options, "cuda", progress)
                self.chosen = f"cuda, {self.info().isa}"
            except LlamaError as error:
                options.host_layers = 0
                self._open(options, "cpu", progress)
                self.chosen = f"cpu, because {error}"
            return
        _alive, raised = as_callback(progress)
        options.progress = _alive
        name, session = ffi.new("char[]", device.encode()), ffi.new("llama_session **")
        options.device = name
        status = lib.llama_session_open(self.model.handle, options, session)
        if raised:
            raise raised[0]
        check(status)
        self._session = ffi.gc(session[0], lib.llama_session_close)

    def _plan(self) -> Plan:
        """Nothing that it counts is taken yet: memory is given when it is written to. A GPU's own
        is the library's to plan."""
        i, c = self.info(), self.config
        if not i.host_layers:
            return Plan(c.weight_bytes, i.scratch_bytes, i.max_seq_len, i.page_positions,
                        i.kv_bytes_per_position, free() if i.device == "cpu" else None)  # fmt: skip
        here = ("tok_embeddings.", *(f"layers.{n}." for n in range(i.host_layers)))
        weights = sum(t.bytes for t in self.model.tensors if t.name.startswith(here))
        return Plan(weights, i.scratch_bytes - i.gpu_scratch_bytes, i.max_seq_len,
                    i.page_positions, i.kv_bytes_per_position * i.host_layers // c.n_layers,
                    free())  # fmt: skip

    @property
    def handle(self) -> Any:
        session = self._session
        if session is None:
            raise LlamaError(f"{self.model.path}: used after close()")
        return session

    def close(self) -> None:
        """Frees it all, or leaves that to the last call that another thread is in."""
        self._session = None
        if self._own:
            self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self) -> SessionInfo:
        i = ffi.new("llama_session_info *")
        check(lib.llama_get_session_info(self.handle, i))
        return SessionInfo(
            device=ffi.string(i.device).decode(), isa=ffi.string(i.isa).decode(),
            threads=i.threads, activations=i.activations, kv_kind=Kind(i.kv_kind).label,
            max_seq_len=i.max_seq_len, page_positions=i.page_positions,
            host_layers=i.host_layers, kv_bytes=i.kv_bytes, scratch_bytes=i.scratch_bytes,
            gpu_scratch_bytes=i.gpu_scratch_bytes, kv_bytes_per_position=i.kv_bytes_per_position,
        )  # fmt: skip

    def forward(
        self,
        tokens: ArrayLike,
        sequences: ArrayLike,
        positions: ArrayLike,
        want: Sequence[bool] | NDArray[np.bool_] | None = None,
        keep: bool = False,
        rope_lengths: ArrayLike | None = None,
        hidden: bool = False,
    ) -> NDArray[np.float32] | None:
        """Computes rows of (token, sequence, position); see llama_batch in lib/llama.h.

        Returns the head's numbers for the rows that WANT them, (n wanted, n_outputs), or with
        HIDDEN the hidden states that the head would read, (n wanted, dim); or, with KEEP, None, and
        the session holds the logits for sample(). ROPE_LENGTHS are each row's, for dynamic rope
        scaling: the length of the whole prompt.
        """
        batch, wanted, alive = _batch(tokens, sequences, positions, want, rope_lengths)
        batch.hidden = hidden
        if keep:
            check(lib.llama_forward(self.handle, batch, ffi.NULL))
            return None
        out = self._run(batch, wanted, self.config.dim if hidden else self.config.n_outputs)
        del alive
        return out

    def trace(
        self, tokens: ArrayLike, sequences: ArrayLike, positions: ArrayLike, want: Sequence[bool],
        rope_lengths: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """forward, and the residual stream of the rows that WANT it, after the embedding and after
        each layer: (n_layers + 1, n wanted, dim) and (n wanted, n_outputs)."""
        batch, wanted, alive = _batch(tokens, sequences, positions, want, rope_lengths)
        stream = np.empty((self.config.n_layers + 1, wanted, self.config.dim), np.float32)
        room = ffi.from_buffer("float[]", stream)
        batch.stream = room
        out = self._run(batch, wanted, self.config.n_outputs)
        del alive, room
        return stream, out

    def _run(self, batch: Any, wanted: int, width: int) -> NDArray[np.float32]:
        out = np.empty((wanted, width), np.float32)
        # one float of room even when no row is wanted: NULL would mean "keep"
        room = out if out.size else np.empty(1, np.float32)
        check(lib.llama_forward(self.handle, batch, ffi.from_buffer("float[]", room)))
        return out

    def length(self, sequence: int) -> int:
        """Positions that SEQUENCE holds."""
        n = ffi.new("uint32_t *")
        check(lib.llama_length(self.handle, _sequence(sequence), n))
        return int(n[0])

    def trim(self, sequence: int, length: int) -> None:
        """Forgets SEQUENCE's positions from LENGTH on."""
        length = _within("length", length)
        check(lib.llama_trim(self.handle, _sequence(sequence), length))

    def fork(self, source: int, target: int, length: int) -> None:
        """TARGET becomes the first LENGTH positions of SOURCE, sharing memory."""
        length = _within("length", length)
        check(lib.llama_fork(self.handle, _sequence(source), _sequence(target), length))

    def slide(self, sequence: int, first: int, count: int) -> None:
        """Drops SEQUENCE's positions [first, first + count); those behind them move down."""
        first, count = _within("first position", first), _within("count", count)
        check(lib.llama_slide(self.handle, _sequence(sequence), first, count))

    def read_kv(self, sequence: int, first: int, n: int) -> bytearray:
        """Keys and values of SEQUENCE's positions [first, first + n), as lib/llama.h lays them."""
        first, n = _within("first position", first), _within("count", n, self.max_seq_len)
        out = bytearray(n * self.info().kv_bytes_per_position)
        check(lib.llama_read_kv(self.handle, _sequence(sequence), first, n,
                                ffi.from_buffer(out), len(out)))  # fmt: skip
        return out

    def write_kv(self, sequence: int, first: int, n: int, kv: bytes | bytearray) -> None:
        """Adds what read_kv() gave behind SEQUENCE's positions, which end at FIRST."""
        first, n = _within("first position", first), _within("count", n)
        check(lib.llama_write_kv(self.handle, _sequence(sequence), first, n,
                                 ffi.from_buffer(kv), len(kv)))  # fmt: skip

    def sample(
        self, row: int, params: SamplingParams, seen: ArrayLike, completion: int, position: int,
        said: int = 0, mu: Mu | None = None,
    ) -> int:  # fmt: skip
        """A token from kept row ROW; SEEN are the tokens so far, for the penalties, the last SAID
        of them the completion's own. MU: mirostat's one number, begun at 2 tau, moved here."""
        ids, token = _int32("seen", seen), ffi.new("int32_t *")
        row, (sampling, _alive) = _within("row", row), _sampling(params, mu)
        check(lib.llama_sample(self.handle, row, sampling, _ints(ids), len(ids), said,
                               completion, position, token))  # fmt: skip
        return int(token[0])

    def logprobs(self, row: int, token: int, n: int) -> tuple[float, dict[int, float]]:
        """TOKEN's log-probability in kept row ROW, and those of the N likeliest in their order."""
        logprob, row = ffi.new("double *"), _within("row", row)
        n = _within("logprobs", n, self.config.vocab_size)
        ids, top = ffi.new("int32_t[]", n), ffi.new("double[]", n)
        check(lib.llama_logprobs(self.handle, row, token, logprob, n, ids, top))
        return float(logprob[0]), dict(zip(ids, top, strict=True))


def _sampling(params: SamplingParams, mu: Mu | None) -> tuple[Any, Any]:
    """llama_sampling, and what must live as long as it does."""
    s = ffi.new("llama_sampling *")
    biases = params.biases
    alive = [ffi.new("int32_t[]", [token for token, _ in biases]),
             ffi.new("float[]", [bias for _, bias in biases]),
             ffi.NULL if mu is None else ffi.from_buffer("double[]", mu)]  # fmt: skip
    s.bias_tokens, s.bias_values, s.mirostat_mu = alive
    s.n_bias = len(biases)
    for name in NUMBERS:
        setattr(s, name, getattr(params, name))
    s.top_k = min(params.top_k, 2**31 - 1)
    s.seed = (params.seed or 0) % 2**64
    return s, alive


def sample_logits(
    logits: ArrayLike,
    params: SamplingParams,
    seen: ArrayLike = (),
    completion: int = 0,
    position: int = 0,
    said: int = 0,
    mu: Mu | None = None,
) -> int:
    """A token from LOGITS (vocab_size); the same choice as Engine.sample makes of them."""
    row = np.ascontiguousarray(logits, np.float32)
    ids, token = _int32("seen", seen), ffi.new("int32_t *")
    sampling, _alive = _sampling(params, mu)
    check(lib.llama_sample_logits(ffi.from_buffer("float[]", row), len(row), sampling, _ints(ids),
                                  len(ids), said, completion, position, token))  # fmt: skip
    return int(token[0])
