"""Other engines as llama.bench measures them: Runners for trial.py, from packages on PyPI.

llama.cpp is called through its C interface in whichever package brings its library. Only what has
kept its place in that interface is relied on: structs of parameters are filled by the library
itself and passed on whole, but for the first four numbers of a context's, which are checked
afterwards. OpenVINO GenAI reads the GGUF file by its own pipeline.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama.errors import LlamaError
from llama.quant import Array
from llama.trial import Job, Runner

INSTALL = {
    "llama.cpp": "pip install xllamacpp (or llama-cpp-python)",
    "openvino": "pip install openvino-genai",
}
PACKAGES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/libllama.*"}
PARAMETERS = 4096  # bytes: more than any struct of parameters takes


def missing(engine: str) -> LlamaError:
    return LlamaError(f"--against {engine}: the package is not installed; {INSTALL[engine]}")


def find(engine: str) -> Callable[[Job], Runner]:
    """What opens a job's file with ENGINE, its package loaded; LlamaError if there is none."""
    if engine == "llama.cpp":
        library, version = load_llama_cpp()
        return lambda job: LlamaCpp(job, library, version)
    if importlib.util.find_spec("openvino_genai") is None:
        raise missing(engine)
    # imported now, so that this is no part of what opening takes
    import openvino
    import openvino_genai

    return lambda job: OpenVino(job, openvino, openvino_genai)


def gguf_of(path: Path, engine: str, folder: Path, random: bool) -> Path:
    """PATH's weights as a GGUF file for ENGINE in FOLDER, made if it is not there yet."""
    from llama.engine import Model
    from llama.to_gguf import to_gguf

    find(engine)  # before long work
    with Model(path) as model:
        kept = folder / f"{path.stem}-{model.fingerprint.hex()[:12]}-{engine}.gguf"
        if kept.exists():
            return kept
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LlamaError(f"{folder}: cannot make this folder: {error.strerror}") from None
        to_gguf(model, kept, quantiser(), random, only_f16=engine == "openvino")
    return kept


# ---- llama.cpp


class Batch(ctypes.Structure):
    """llama_batch of llama.cpp's llama.h."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class ModelParameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * PARAMETERS)]


class ContextParameters(ctypes.Structure):
    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("bytes", ctypes.c_uint8 * PARAMETERS),
    ]


def load_llama_cpp() -> tuple[Any, str]:
    """llama.cpp's library and "package version"."""
    for package, pattern in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or []:
            for path in sorted(Path(folder).glob(pattern)):
                try:
                    library = ctypes.CDLL(str(path))
                except OSError as error:
                    raise LlamaError(f"{path}: cannot be loaded: {error}") from None
                try:
                    version = importlib.metadata.version(package.replace("_cpp", "-cpp-python"))
                except importlib.metadata.PackageNotFoundError:
                    version = "of unknown version"
                return _declared(library, path), f"{package} {version}"
    raise missing("llama.cpp")


def _declared(library: Any, path: Path) -> Any:
    """LIBRARY with the types of what is called, and ready to be used."""
    pointer, number, signed = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int32
    types: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_print_system_info": (ctypes.c_char_p, []),
        "llama_log_set": (None, [pointer, pointer]),
        "llama_model_default_params": (ModelParameters, []),
        "llama_context_default_params": (ContextParameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, ModelParameters]),
        "llama_model_free": (None, [pointer]),
        "llama_init_from_model": (pointer, [pointer, ContextParameters]),
        "llama_free": (None, [pointer]),
        "llama_set_n_threads": (None, [pointer, signed, signed]),
        "llama_n_ctx": (number, [pointer]),
        "llama_n_batch": (number, [pointer]),
        "llama_n_seq_max": (number, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_memory_seq_rm": (ctypes.c_bool, [pointer, signed, signed, signed]),
        "llama_memory_seq_cp": (None, [pointer, signed, signed, signed, signed]),
        "llama_decode": (signed, [pointer, Batch]),
        "llama_synchronize": (None, [pointer]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, signed]),
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            [signed, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer],
        ),
    }  # fmt: skip
    for name, (result, arguments) in types.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise LlamaError(f"{path}: has no {name}; another version is needed") from None
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    if hasattr(library, "ggml_backend_load_all"):
        library.ggml_backend_load_all()
    return library


def quantiser() -> Callable[[Array, Any], Array]:
    """llama.cpp's own where it is installed, else the gguf package's; for to_gguf."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import quantize

    try:
        library = load_llama_cpp()[0]
    except LlamaError:
        return quantize

    def quantise(values: Array, type_: Any) -> Array:
        rows, columns = values.shape
        block, size = GGML_QUANT_SIZES[type_]
        source = np.ascontiguousarray(values, np.float32)
        out = np.empty((rows, columns // block * size), np.uint8)
        done = library.ggml_quantize_chunk(
            int(type_), source.ctypes.data, out.ctypes.data, 0, rows, columns, None
        )
        assert done == out.nbytes
        return out

    return quantise


class LlamaCpp:
    """A Runner. Prompts go in batches as large as the library takes, in its default settings."""

    def __init__(self, job: Job, library: Any, version: str) -> None:
        self.job, self.lib, self.version = job, library, version
        parts = library.llama_print_system_info().decode().replace(":", "|").split("|")
        self.features = " ".join(part.split()[0] for part in parts if part.strip()[-3:] == "= 1")
        self._log: list[str] = []
        log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._logged = log(lambda _, text, __: self._log.append(text.decode("utf-8", "replace")))
        library.llama_log_set(self._logged, None)
        self._context: Any = None
        self._memory: Any = None
        self._sequences = self._depth = 0
        name = str(job.path).encode()
        self._model = library.llama_model_load_from_file(name, library.llama_model_default_params())
        if not self._model:
            raise LlamaError(f"{job.path}: llama.cpp cannot open it: {self._reason()}")
        self._open(1)

    def _reason(self) -> str:
        """The last that it logged, or the last error."""
        lines = [line for line in "".join(self._log).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line or "failed" in line]
        return (errors[:1] or lines[-1:] or ["no reason given"])[0].strip()

    def _open(self, sequences: int) -> None:
        """A context that takes so many sequences of the job's length."""
        if self._context is not None:
            self.lib.llama_free(self._context)
        wanted = self.lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = sequences * self.job.positions, sequences
        self._context = self.lib.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise LlamaError(f"{self.job.path}: llama.cpp: {self._reason()}")
        found = (self.lib.llama_n_ctx(self._context), self.lib.llama_n_seq_max(self._context))
        if found[0] < wanted.n_ctx or found[1] != sequences:
            raise LlamaError(
                f"llama.cpp of {self.version}: asked for {wanted.n_ctx} positions and {sequences} "
                f"sequences, got {found[0]} and {found[1]}: not a version that is known here"
            )
        self.lib.llama_set_n_threads(self._context, self.job.threads, self.job.threads)
        self._memory = self.lib.llama_get_memory(self._context)
        self._sequences, self._depth = sequences, 0

    def _batches(
        self, ids: Sequence[int], at: Sequence[int], sequences: Sequence[int]
    ) -> list[Batch]:
        """Rows as batches that the library takes; each sequence's last has logits."""
        most = self.lib.llama_n_batch(self._context)
        last = {sequence: i for i, sequence in enumerate(sequences)}
        made = []
        for first in range(0, len(ids), most):
            part = slice(first, first + most)
            n = len(ids[part])
            ints, pointers = ctypes.c_int32 * n, ctypes.POINTER(ctypes.c_int32) * n
            own = [ints(s) for s in sequences[part]]
            wants = [last[s] == first + i for i, s in enumerate(sequences[part])]
            made.append(Batch(
                n, ints(*ids[part]), None, ints(*at[part]), ints(*[1] * n),
                pointers(*[ctypes.cast(s, ctypes.POINTER(ctypes.c_int32)) for s in own]),
                (ctypes.c_int8 * n)(*wants),
            ))  # fmt: skip
        return made

    def _compute(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            status = self.lib.llama_decode(self._context, batch)
            if status:
                raise LlamaError(f"llama.cpp: llama_decode gave {status}: {self._reason()}")
            self.lib.llama_synchronize(self._context)

    def prompt(self, ids: Sequence[int]) -> float:
        self.lib.llama_memory_clear(self._memory, True)
        batches = self._batches(ids, range(len(ids)), [0] * len(ids))
        start = time.perf_counter()
        self._compute(batches)
        return time.perf_counter() - start

    def fill(self, depth: int, batch: int) -> None:
        if batch != self._sequences:
            self._open(batch)
        self.lib.llama_memory_clear(self._memory, True)
        self._depth = depth
        if depth:
            self._compute(self._batches(self.job.ids(depth), range(depth), [0] * depth))
            for sequence in range(1, batch):
                self.lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def decode(self, n: int) -> float:
        batch = range(self._sequences)
        batches: list[Batch] = []
        for at in range(self._depth, self._depth + n):
            ids = [(at + 31 * s) % self.job.vocab_size for s in batch]
            batches += self._batches(ids, [at] * len(batch), batch)
        start = time.perf_counter()
        self._compute(batches)
        seconds = time.perf_counter() - start
        for sequence in batch:
            self.lib.llama_memory_seq_rm(self._memory, sequence, self._depth, -1)
        return seconds

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        if self._sequences != 1:
            self._open(1)
        self.lib.llama_memory_clear(self._memory, True)
        found: list[int] = []
        for at in range(n):
            new, first = (ids, 0) if not found else (found[-1:], len(ids) + at - 1)
            places = range(first, first + len(new))
            self._compute(self._batches(new, places, [0] * len(new)))
            logits = self.lib.llama_get_logits_ith(self._context, -1)
            row = np.ctypeslib.as_array(logits, (self.job.vocab_size,))
            found.append(int(np.argmax(row)))
        return found

    def held(self) -> dict[str, int]:
        return {}

    def between(self) -> None:
        pass

    def close(self) -> None:
        self.lib.llama_free(self._context)
        self.lib.llama_model_free(self._model)

    def facts(self) -> dict[str, Any]:
        return {}


# ---- OpenVINO


class OpenVino:
    """A Runner. A pipeline keeps no sequence from one call to the next, so each measurement reads
    its positions first; a sequence has one position at least. It knows prompts that it has read
    once, so each prompt that is timed begins with another token."""

    def __init__(self, job: Job, openvino: Any, openvino_genai: Any) -> None:
        self.job, self.genai, self.openvino = job, openvino_genai, openvino
        self.version = f"openvino-genai {openvino_genai.__version__}"
        found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.features = " ".join(sorted(found))
        try:
            self._pipeline = openvino_genai.LLMPipeline(
                job.path, "CPU", INFERENCE_NUM_THREADS=job.threads
            )
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise LlamaError(f"{job.path}: OpenVINO cannot open it: {lines[-1]}") from None
        self._prompts: list[Sequence[int]] = [[0]]
        self._read = 0  # prompts so far

    def _generate(self, prompts: Sequence[Sequence[int]], n: int) -> Any:
        chosen = self.genai.GenerationConfig()
        chosen.max_new_tokens, chosen.ignore_eos, chosen.do_sample = n, True, False
        ids = np.array(prompts, np.int64)
        tensors = self.openvino.Tensor(ids), self.openvino.Tensor(np.ones_like(ids))
        return self._pipeline.generate(self.genai.TokenizedInputs(*tensors), chosen)

    def prompt(self, ids: Sequence[int]) -> float:
        self._read += 1
        new = [self._read % self.job.vocab_size, *ids[1:]]
        start = time.perf_counter()
        self._generate([new], 1)
        return time.perf_counter() - start

    def fill(self, depth: int, batch: int) -> None:
        ids = self.job.ids(max(depth, 1) + batch)
        self._prompts = [ids[s : s + max(depth, 1)] for s in range(batch)]

    def decode(self, n: int) -> float:
        """From the first new token, which the reading gives, to the N-th after it."""
        metrics = self._generate(self._prompts, n + 1).perf_metrics.raw_metrics
        steps = list(metrics.token_infer_durations)[1:]
        if len(steps) != n:
            raise LlamaError(f"OpenVINO reports {len(steps)} steps, expected {n}")
        return float(sum(steps)) / 1e6

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        return [int(token) for token in self._generate([ids], n).tokens[0]]

    def held(self) -> dict[str, int]:
        return {}

    def between(self) -> None:
        pass

    def close(self) -> None:
        del self._pipeline

    def facts(self) -> dict[str, Any]:
        return {}
