"""Code Llama's vocabulary made of Llama 2's: sixteen pieces more, four of which infill. In the
published files these are common pieces, made by merges, and so they are here."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

MERGED = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT", "▁<PRE>", "▁<SUF>", "▁<MID>",
          "▁<EOT>"]  # fmt: skip
ADDED = [*MERGED, *(f"▁<EOT>{n}" for n in range(5))]  # ids 32000 to 32015
PRE, SUF, MID, EOT = 32007, 32008, 32009, 32010
MERGES = [
    ("▁<", "SU"), ("▁<SU", "F"), ("▁<", "PRE"), ("▁<", "M"), ("▁<M", "ID"), ("▁<", "E"),
    ("▁<E", "OT"), ("▁<PRE", ">"), ("▁<SUF", ">"), ("▁<MID", ">"), ("▁<EOT", ">"),
]  # fmt: skip


def model(data: Path) -> bytes:
    """A SentencePiece model, the pieces added as bytes of its protobuf."""
    out = (data / "tokenizers" / "llama2_tokenizer.model").read_bytes()
    for n, piece in enumerate(ADDED):
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -31741.0 - n)
        out += b"\x0a" + bytes([len(body)]) + body
    return out


def document(data: Path) -> dict[str, Any]:
    """A tokenizer.json, the four tokens among its added ones."""
    found: dict[str, Any] = json.loads(
        (data / "tokenizers" / "hf_llama2_tokenizer.json").read_text("utf-8")
    )
    inner = found["model"]
    inner["vocab"] |= {piece: 32000 + n for n, piece in enumerate(ADDED)}
    joined = isinstance(inner["merges"][0], str)
    inner["merges"] += [f"{a} {b}" if joined else [a, b] for a, b in MERGES]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in (PRE, SUF, MID, EOT):
        content = ADDED[token - 32000]
        found["added_tokens"].append({"id": token, "content": content, **flags, "special": True})
    return found


def gguf_lists(data: Path, writer: Any, named: dict[str, int]) -> None:
    """The vocabulary as llama.cpp's converter writes it, with NAMED token ids."""
    library = SentencePieceProcessor(model_proto=model(data))
    n = library.vocab_size()
    kinds = [
        2 if library.is_unknown(i) else 3 if library.is_control(i)
        else 6 if library.is_byte(i) else 1
        for i in range(n)
    ]  # fmt: skip
    writer.add_tokenizer_model("llama")
    writer.add_token_list([library.id_to_piece(i) for i in range(n)])
    writer.add_token_scores([library.get_score(i) for i in range(n)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, token in named.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
