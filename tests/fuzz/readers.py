"""One reader of other people's files under libFuzzer, by atheris: `readers.py TARGET [flags] DIR`.

Any bytes give a LlamaError, or a checkpoint that is exported whole and whose every field format.py,
which checks them all, reads back. Anything else that a reader raises is a finding; so is a child
process that dies. `trial` is the same without atheris, for the tests of the corpus.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MOST = 24 << 10  # bytes of an input


def main() -> None:
    import atheris

    target = sys.argv.pop(1)
    with atheris.instrument_imports(include=["llama", "gguf", "jinja2"]):
        run = trial(target)
        from llama import sandbox
    sandbox.SECONDS = 2.0  # what never ends would cost most of the time
    atheris.Setup([*sys.argv, f"-max_len={MOST}"], run)
    atheris.Fuzz()


def trial(target: str) -> Callable[[bytes], None]:
    """What a target does with an input; raises what the reader should not have raised."""
    from llama.errors import LlamaError

    # in memory, where there is such a folder: nothing is to be kept
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    parent = os.getpid()

    def leave() -> None:
        if os.getpid() == parent:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(leave)
    work = {"gguf": _source, "llama2c": _source, "pth": _source, "safetensors": _source,
            "config": _config, "tokenizer": _tokenizer, "template": _template,
            "session": _session}[target]  # fmt: skip
    run = work(target, folder)

    def one(data: bytes) -> None:
        try:
            run(data)
        except LlamaError as error:
            line = str(error)
            if not line or "\n" in line:
                raise AssertionError(f"not one line: {line!r}") from None

    return one


def _export(path: Path, out: Path) -> None:
    from llama import checkpoints
    from llama.checkpoints.convert import convert
    from llama.format import read

    checkpoint = checkpoints.load(path)
    checkpoint.describe()
    convert(checkpoint, out, checkpoint.default_kind(), force=True)
    read(out)


def _source(target: str, folder: Path) -> Callable[[bytes], None]:
    """A whole file; a pickle alone is put into a zip, a JSON header before its data."""
    import small_sources

    files = small_sources.sources()[target]
    path = small_sources.put(folder / "source", files)
    damaged = (folder / "source" / next(iter(files)))
    tensors = small_sources.weights()
    rest = b"".join(values.tobytes() for values in tensors.values())

    def run(data: bytes) -> None:
        if target == "pth" and data[:1] == b"\x80":
            data = small_sources.zipped(data, tensors)
        if target == "safetensors" and data[:1] == b"{":
            data = len(data).to_bytes(8, "little") + data + rest
        damaged.write_bytes(data)
        _export(path, folder / "out.bin")

    return run


def _config(target: str, folder: Path) -> Callable[[bytes], None]:
    """The JSON beside the weights: parts divided by a zero byte go to each of the names."""
    import small_sources

    names = {"safetensors": ["config.json", "tokenizer_config.json", "generation_config.json"],
             "pth": ["params.json"]}  # fmt: skip
    sources = small_sources.sources()
    paths = {form: small_sources.put(folder / form, sources[form]) for form in names}

    def run(data: bytes) -> None:
        form = "pth" if data[:1] == b"M" else "safetensors"
        parts = data[1:].split(b"\0")
        for at, name in enumerate(names[form]):
            file = paths[form] / name
            if at < len(parts):
                file.write_bytes(parts[at])
            else:
                file.unlink(missing_ok=True)
        _export(paths[form], folder / "out.bin")

    return run


def _tokenizer(target: str, folder: Path) -> Callable[[bytes], None]:
    """A tokenizer's file beside a checkpoint, and the same bytes as a blob in a .bin."""
    from llama.checkpoints import tokenizer_file
    from llama.errors import LlamaError
    from llama.tokenizer import open_tokenizer

    path = folder / "tokenizer.bin"

    def run(data: bytes) -> None:
        path.write_bytes(data[1:])
        kinds = ("sentencepiece", "json", "tiktoken")
        blobs = [(kinds[data[0] % 3], data[1:], 64)] if data else []
        try:
            found = tokenizer_file.read(path)
            blobs.append((found.kind.name.lower(), found.data, found.vocab_size))
        except LlamaError:
            pass
        for kind, blob, size in blobs:
            opened = open_tokenizer(kind, blob, size, None, (), {})
            ids = opened.encode("ab <s> \u00e9\n")
            assert all(0 <= token < size for token in ids), ids
            opened.decode(range(min(size, 300)))

    return run


def _session(target: str, folder: Path) -> Callable[[bytes], None]:
    """A session's file, for a model that answers from it. Its length, model and checksum are made
    right, but where the first byte is odd."""
    import tiny_chat

    from llama import SamplingParams, session
    from llama.generate import Llama

    llm = Llama(tiny_chat.write(folder / "chat.bin"), threads=1, max_seq_len=200)
    params, path = SamplingParams(temperature=0.0, max_tokens=1), folder / "a.session"

    def run(data: bytes) -> None:
        odd, file = data[:1] >= b"\x01" and data[0] % 2, bytearray(data[1:])
        if not odd and len(file) >= session.HEADER.size + 4:
            file[16:48] = llm._engine.model.fingerprint
            file[72:80] = len(file).to_bytes(8, "little")
            file[-4:] = zlib.crc32(file[:-4]).to_bytes(4, "little")
        path.write_bytes(file)
        messages, tokens = llm.load_session(path)
        assert tokens <= 200 and session.check(messages) == messages
        question = {"role": "user", "content": "?"}
        llm.chat([*messages[:1], question] if len(messages) < 2 else [*messages, question], params)

    return run


def _template(target: str, folder: Path) -> Callable[[bytes], None]:
    """A chat template out of a file, over a few dialogs. It runs in a process of its own, which
    gives no coverage; parsing it here does."""
    import jinja2
    from fake_engine import byte_tokenizer

    from llama.templates import ChatTemplate
    from llama.tokenizer import open_tokenizer

    tokenizer = open_tokenizer("json", byte_tokenizer(), 259, None, (0,), {})
    dialogs = [[("user", "a <|im_end|> b")], [("system", "s"), ("user", "a")],
               [("user", "a"), ("assistant", ""), ("user", "{{ 1 }}")]]  # fmt: skip

    parser = jinja2.Environment()

    def run(data: bytes) -> None:
        meta = {"template.jinja": data.decode("utf-8", "replace")}
        with contextlib.suppress(jinja2.TemplateError, RecursionError):
            parser.parse(meta["template.jinja"])
        template = ChatTemplate(tokenizer, meta)
        for dialog in dialogs:
            ids = template.encode([{"role": role, "content": text} for role, text in dialog])
            assert all(0 <= token < 259 for token in ids)

    return run


if __name__ == "__main__":
    main()
