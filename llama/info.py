"""run.py --info: what a model file is, as far as it says so itself, and what it takes of this
machine's memory, without computing anything.

The file may come from anyone, so each line is printable whatever stands in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llama import golden
from llama.config import Head, Rope
from llama.engine import Engine, Model
from llama.errors import LlamaError, one_line
from llama.facts import Config
from llama.receipt import read_receipt
from llama.tokenizer import open_tokenizer

HEADS = {
    Head.LM: "language model", Head.NONE: "none: hidden states",
    Head.SEQUENCE: "sequence classification", Head.ANSWER: "question answering",
    Head.TOKEN: "token classification",
}  # fmt: skip
TEXTS = {"general.name": "name", "general.license": "licence", "general.origin": "origin"}
SHOWN = {*TEXTS, "template.family", "template.jinja", "tokenizer.special", "quantize.receipt",
         "head.labels", "infill.refused", "infill.tokens", golden.KEY}  # fmt: skip
WIDTH = 500  # characters of a line


def show(path: Path, max_seq_len: int | None = None, kv: str | None = None) -> int:
    """Prints it; the exit status."""
    for line in describe(path, max_seq_len, kv):
        print(line)
    return 0


def describe(path: Path, max_seq_len: int | None = None, kv: str | None = None) -> Iterator[str]:
    """Lines for a person; MAX_SEQ_LEN and KV as for an Engine. LlamaError where the file at PATH
    cannot be opened."""
    for name, text in (*_facts(path), *_memory(path, max_seq_len, kv)):
        line = one_line(f"{name:<12}{text}")
        yield line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..."


def _facts(path: Path) -> Iterator[tuple[str, object]]:
    with Model(path) as model:
        c, meta, n_tensors = model.config, model.meta, len(model.tensors)
        tokenizer = model.tokenizer
    yield "file", f"{path}: {c.file_bytes / 1e6:,.1f} MB, {n_tensors} tensors, most of it {c.dtype}"
    for key, name in TEXTS.items():
        if key in meta:
            yield name, meta[key]
    yield "shape", _shape(c)
    yield "head", HEADS[c.head] + _labels(c, meta)
    yield "rope", _rope(c)
    yield "tokenizer", _tokenizer(c, tokenizer, meta)
    family, jinja = meta.get("template.family"), "its own in Jinja" * ("template.jinja" in meta)
    yield "template", ", ".join(str(x) for x in (family, jinja) if x) or (
        "none: a base model" if c.head == Head.LM else "none"
    )
    if "infill.refused" in meta:
        yield "infilling", f"no: {meta['infill.refused']!s}"
    elif "infill.tokens" in meta:
        yield "infilling", "yes"
    try:
        stored = golden.load(meta, c)
        of = " and of its source's" * bool(stored and stored.source)
        answers = stored and f"answers to {len(stored.ids)} ids{of}; run.py --selftest compares"
        yield "selftest", answers or "none stored"
    except LlamaError as error:
        yield "selftest", error
    if "quantize.receipt" in meta:
        try:
            receipt = read_receipt(meta["quantize.receipt"])
            yield "quantised", f"from {receipt.source} to " + (
                f"{receipt.bits} bits" if receipt.bits else "a mixture of kinds"
            )
            if receipt.command:
                yield "", f"by {receipt.command}"
                yield "", f"source's SHA-256, of all before its weights: {receipt.source_sha256}"
            for line in receipt.lines():
                yield "", line
        except LlamaError as error:
            yield "quantised", error
    if others := sorted(meta.keys() - SHOWN):
        yield "also holds", ", ".join(others)


def _memory(path: Path, max_seq_len: int | None, kv: str | None) -> Iterator[tuple[str, object]]:
    with Engine(path, threads=1, max_seq_len=max_seq_len, kv=kv, any_size=True) as engine:
        plan = engine.plan
    yield "memory", plan.line()
    for trouble in (plan.refusal, plan.warning):
        if trouble:
            yield "", trouble


def _labels(c: Config, meta: Mapping[str, object]) -> str:
    if c.head not in (Head.SEQUENCE, Head.TOKEN):
        return ""
    if c.head == Head.SEQUENCE and c.n_labels == 1:
        return ", one label: a reward model"
    named = f": {meta['head.labels']}" if "head.labels" in meta else ""
    return f", {c.n_labels} label" + "s" * (c.n_labels > 1) + named


def _shape(c: Config) -> str:
    parts = [
        f"{c.n_layers} layer" + "s" * (c.n_layers > 1), f"dim {c.dim}",
        f"hidden_dim {c.hidden_dim}",
        f"{c.n_heads} heads" + f" ({c.n_kv_heads} kv)" * (c.n_kv_heads != c.n_heads),
        f"head_dim {c.head_dim}", f"vocab {c.vocab_size}", f"context {c.max_seq_len}",
    ]  # fmt: skip
    for name in ("tied", "attention_bias", "mlp_bias", "output_bias"):
        parts += [name] * getattr(c, name)
    return ", ".join(parts)


def _rope(c: Config) -> str:
    if c.rope_scaling == Rope.PLAIN:
        return f"theta {c.rope_theta:g}"
    numbers = ", ".join(f"{number:g}" for number in c.rope_numbers)
    return f"theta {c.rope_theta:g}, {c.rope_scaling.name.lower()} scaling {numbers}"


def _tokenizer(c: Config, found: tuple[str, bytes], meta: Mapping[str, object]) -> str:
    if found[0] == "none":
        return "none: token ids only"
    try:
        tokenizer = open_tokenizer(*found, c.vocab_size, c.bos_id, c.eos_ids, meta)
        ends = ", ".join(f"{i} {tokenizer.piece(i)!r}" for i in c.eos_ids) or "none"
        begin = "none" if c.bos_id is None else f"{c.bos_id} {tokenizer.piece(c.bos_id)!r}"
    except LlamaError as error:
        return f"{found[0]}: {error}"
    return f"{found[0]}, {tokenizer.size} tokens, begin {begin}, end {ends}"
