"""Checkpoints of others, recognised by looking and written as one .bin: the export wing.

One file a source (meta, hf, gguf, llama2c); each returns a Checkpoint whose tensors are read a
few rows at a time. `export` is the whole of export.py; lora.py merges adapters into any of them,
default.py is for when there is no model yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from llama.checkpoints import infill, llama2c, lora, positions, tied
from llama.checkpoints.checkpoint import FLOATS, Checkpoint, Options
from llama.checkpoints.convert import convert, records_of
from llama.checkpoints.family import FAMILIES
from llama.errors import LlamaError
from llama.format import MAGIC, Writer

__all__ = ["Checkpoint", "Options", "export", "find", "load", "recognise"]
MODULES = {"Meta": "meta", "Hugging Face": "hf", "GGUF": "gguf", "llama2.c": "llama2c"}
EXPECTED = (
    "a directory with params.json (Meta) or config.json (Hugging Face), a .gguf file, or "
    "llama2.c's .bin"
)


def recognise(path: Path) -> str:
    """What lies at PATH: a key of MODULES. LlamaError says what was expected and found."""
    if path.is_dir():
        if (path / "params.json").is_file():
            return "Meta"
        if (path / "config.json").is_file():
            return "Hugging Face"
        raise LlamaError(f"{path}: expected {EXPECTED}; found a directory with neither")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise LlamaError(f"{path}: cannot read: {error.strerror}") from None
    if head.startswith(b"GGUF"):
        return "GGUF"
    if head.startswith(MAGIC):
        raise LlamaError(f"{path}: is already an exported model; run it with run.py --bin={path}")
    if llama2c.recognise(head, size):
        return "llama2.c"
    if head.startswith(b"PK") or path.suffix == ".safetensors":
        raise LlamaError(f"{path}: expected the checkpoint's directory, found one of its files")
    found = f"a file that starts with {head[:8]!r}" if head else "an empty file"
    raise LlamaError(f"{path}: expected {EXPECTED}; found {found}")


def load(
    path: Path,
    options: Options = Options(),  # noqa: B008 (frozen)
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Checkpoint:
    """Recognises a checkpoint and reads everything but its weights, of which only the embedding
    may be compared with the output matrix: PROGRESS hears (rows done, all rows). Raises
    LlamaError."""
    if options.template not in (None, "none", *FAMILIES):
        raise LlamaError(
            f"--template: expected {', '.join(FAMILIES)} or none, found {options.template}"
        )
    scaling = None if options.rope_scaling is None else positions.parse(options.rope_scaling)
    source = recognise(path)
    module = import_module(f"llama.checkpoints.{MODULES[source]}")
    checkpoint: Checkpoint = module.load(path, options)
    positions.apply(checkpoint, scaling, options.max_seq_len)
    if options.template is not None:
        checkpoint.meta.pop("template.family", None)
        if options.template != "none":
            checkpoint.meta["template.family"] = options.template
    tied.store_once(checkpoint, progress)
    if options.lora:
        checkpoint.check()
        for adapter in options.lora:
            lora.merge(checkpoint, adapter)
        tied.store_once(checkpoint, progress)
    if checkpoint.tokenizer.special:
        checkpoint.meta["tokenizer.special"] = json.dumps(checkpoint.tokenizer.special)
    infill.settle(checkpoint, options.infill)
    checkpoint.check()
    return checkpoint


def find(directory: Path) -> Path | None:
    """The one checkpoint in DIRECTORY, or None; several are a LlamaError that lists them."""
    found = []
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            try:
                recognise(path)
            except LlamaError:
                continue
            found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise LlamaError(f"{directory}: several checkpoints, name one of them: {names}")
    return found[0] if found else None


def export(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    options: Options = Options(),  # noqa: B008 (frozen)
    say: Callable[[str], object] | None = None,
) -> None:
    """Writes the checkpoint at SOURCE as OUT; a person follows along on standard error.

    DTYPE is "f32", "f16" or "bf16"; None takes the source's own, f16 for a quantised one.
    """
    from tqdm import tqdm

    say = say or (lambda line: print(line, file=sys.stderr))
    with tqdm(desc="comparing", unit="row", leave=False, disable=None, delay=1) as bar:

        def compared(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        checkpoint = load(source, options, compared)
    say(checkpoint.describe())
    for note in checkpoint.notes:
        say(f"  {note}")
    golden = _golden(checkpoint, say)
    kind = checkpoint.default_kind() if dtype is None else FLOATS[dtype]
    total = sum(record.size() for record in records_of(checkpoint, kind))
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def finish(writer: Writer) -> None:
            bar.close()
            golden(writer)

        size = convert(checkpoint, out, kind, force=force, progress=bar.update, finish=finish)
    say(f"wrote {out}: {kind.label}, {size:,} bytes")


def _golden(checkpoint: Checkpoint, say: Callable[[str], object]) -> Callable[[Writer], object]:
    """Sets room aside for what run.py --selftest will compare; returns what fills it in the end.
    The C library computes it; where that cannot be had a model is exported all the same."""
    try:
        from llama import golden
    except (LlamaError, ModuleNotFoundError) as error:
        say(f"  nothing is stored for run.py --selftest: {error}")
        return lambda writer: None
    checkpoint.meta[golden.KEY] = golden.room(checkpoint.config)
    return lambda writer: golden.store(writer, say=say)
