"""The small valid files that each fuzz target starts from, beside its findings in tests/corpus/."""

from __future__ import annotations

import json
import tempfile
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_sources
import tiny_chat
from fake_engine import byte_tokenizer
from small_sources import SHAPE

from llama import SamplingParams
from llama.config import Head, Rope
from llama.generate import Llama
from llama.quant import Kind

TEMPLATES = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if loop.first and m['role'] == 'system' %}"
    "{% set s = m['content'] %}{% continue %}{% endif %}[INST] {{ m['content'] | tojson }}"
    " {{ strftime_now('%d %b %Y') }}{{ eos_token }}{% endfor %}",
    "{{ raise_exception('no') }}", "{{ messages[0].__class__.__mro__ }}", "{{ 'a' * 9 }}",
    "{% for i in range(9) %}{{ i }}{% endfor %}", "{{ 9 ** (9 ** 9) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ messages | length }}",
]  # fmt: skip


def of(target: str) -> list[bytes]:
    """The seeds of a target, as bytes."""
    return {"bin": _bins, "sampler": _samplers, "gguf": _ggufs, "config": _configs,
            "tokenizer": _tokenizers,
            "llama2c": lambda: [small_sources.llama2c()],
            "safetensors": _safetensors, "pth": _pths, "session": _sessions,
            "template": lambda: [text.encode() for text in TEMPLATES]}[target]()  # fmt: skip


def _bins() -> list[bytes]:
    groups = replace(SHAPE, dim=32, hidden_dim=32, head_dim=16)
    rope: dict[str, Any] = {"rope_scaling": Rope.LLAMA3, "rope_numbers": (8.0, 1.0, 4.0, 8.0)}
    shapes = [
        (SHAPE, Kind.F32), (replace(SHAPE, tied=True, **rope), Kind.F16),
        (replace(SHAPE, attention_bias=True, mlp_bias=True), Kind.BF16),
        (replace(SHAPE, head=Head.TOKEN, n_labels=3, output_bias=True), Kind.F16),
        (replace(SHAPE, head=Head.NONE, rope_scaling=Rope.YARN,
                 rope_numbers=(2.0, 8.0, 32.0, 1.0, 1.1, 1.0)), Kind.Q8),
        (replace(SHAPE, rope_scaling=Rope.DYNAMIC, rope_numbers=(2.0, 2.0), tied=True), Kind.Q4),
        (replace(groups, tied=True), Kind.Q8R), (groups, Kind.Q4R), (SHAPE, Kind.Q4E),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return [small_sources.ours(Path(folder) / "a.bin", shape, kind) for shape, kind in shapes]


def _samplers() -> list[bytes]:
    plain = bytes([20, 4, 2, 70, 3, 4, 5, 6])
    return [plain + bytes(120), plain + bytes(range(150)), bytes([200] * 200)]


def _ggufs() -> list[bytes]:
    groups = replace(SHAPE, dim=32, hidden_dim=32, head_dim=16)
    return [small_sources.gguf(), small_sources.gguf(groups, True)]


def _safetensors() -> list[bytes]:
    whole = small_sources.hf_weights()
    size = int.from_bytes(whole[:8], "little")
    return [whole, whole[8 : 8 + size]]


def _pths() -> list[bytes]:
    return [small_sources.pth(), small_sources.pickled(small_sources.weights())]


def _configs() -> list[bytes]:
    config = json.loads(small_sources.hf_config())
    ropes = [{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8},
             {"type": "dynamic", "factor": 2}, {"type": "linear", "factor": 2}]  # fmt: skip
    more = b'\0{"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"1": {"content": "<s>"' \
           b', "special": true}}}\0{"eos_token_id": [2, 3]}'  # fmt: skip
    found = [b"H" + json.dumps(config | {"rope_scaling": rope}).encode() for rope in ropes]
    return [b"H" + small_sources.hf_config() + more, *found, b"M" + small_sources.meta_params()]


def _sessions() -> list[bytes]:
    dialog = [("system", "s"), ("user", "a"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in dialog]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model, path = tiny_chat.write(Path(folder) / "chat.bin"), Path(folder) / "a.session"
        with Llama(model, threads=1, max_seq_len=200) as llm:
            for first in (0, 1, 3):
                if first == 3:
                    llm.chat(messages[:2], SamplingParams(max_tokens=3))
                llm.save_session(path, messages[:first])
                found += [bytes([odd]) + path.read_bytes() for odd in (0, 1)]
    return found


def _tokenizers() -> list[bytes]:
    words = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc"]
    ranks = b"".join(b"%s %d\n" % (b64encode(word), i) for i, word in enumerate(words))
    blobs = [small_sources.sentencepiece(), small_sources.llama2c_tokenizer(),
             small_sources.tokenizer_json(), ranks, byte_tokenizer()]  # fmt: skip
    return [bytes([kind]) + blob for kind, blob in zip((0, 0, 1, 2, 1), blobs, strict=True)]
