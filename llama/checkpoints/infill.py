"""Whether a checkpoint can infill, and by which tokens: Code Llama (arXiv:2308.12950, 2.3).

The vocabulary must hold the four pieces, and the variant must have been trained for it: 7B, 13B
and 70B, base and Instruct, by the paper and the model card. In the published vocabularies the
pieces are common words, which a text may contain; here they become control tokens.
"""

from __future__ import annotations

import json
import re

from llama.checkpoints import model_proto
from llama.checkpoints.checkpoint import Checkpoint, Tokenizer
from llama.errors import LlamaError
from llama.format import Config, TokenizerKind

PIECES = {"prefix": "▁<PRE>", "suffix": "▁<SUF>", "middle": "▁<MID>", "end": "▁<EOT>"}


def settle(checkpoint: Checkpoint, wanted: bool | None) -> None:
    """Notes in the checkpoint's meta which tokens infill, or why the model does not; WANTED
    overrules what its name and shape say, but not a vocabulary without the tokens."""
    ids, named = _ids(checkpoint.tokenizer), checkpoint.tokenizer.infill
    if named and any(ids.get(name) != token for name, token in named.items()):
        checkpoint.meta["infill.refused"] = "its infilling tokens are not Code Llama's"
        ids = {}
    if not ids:
        if wanted:
            names = ", ".join(PIECES.values())
            raise LlamaError(f"{checkpoint.path}: --infill yes: the vocabulary lacks {names}")
        return
    _hide(checkpoint, ids)
    name = checkpoint.path.resolve().name + " " + str(checkpoint.meta.get("general.name", ""))
    jinja = str(checkpoint.meta.get("template.jinja", ""))
    reason = _refusal(checkpoint.config, name, "<step>" in jinja)
    if wanted is False:
        reason = "switched off when it was exported"
    elif wanted:
        reason = None
    if reason is None:
        checkpoint.meta["infill.tokens"] = json.dumps(ids)
        if wanted is None:
            note = "infilling: inferred from the vocabulary (--infill no switches it off)"
            checkpoint.notes.append(note)
        return
    checkpoint.meta["infill.refused"] = reason
    if wanted is None:
        checkpoint.notes.append(f"no infilling: {reason} (--infill yes overrules)")


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The four tokens' ids, or none."""
    if b"<PRE>" not in tokenizer.data:  # opening the libraries takes a moment
        return {}
    if tokenizer.kind == TokenizerKind.SENTENCEPIECE:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=tokenizer.data)
        ids = {name: model.piece_to_id(piece) for name, piece in PIECES.items()}
        if all(model.id_to_piece(ids[name]) == piece for name, piece in PIECES.items()):
            return ids
    elif tokenizer.kind == TokenizerKind.JSON:
        from tokenizers import Tokenizer as Library

        library = Library.from_str(tokenizer.data.decode("utf-8"))
        found = {name: library.token_to_id(piece) for name, piece in PIECES.items()}
        ids = {name: token for name, token in found.items() if token is not None}
        if len(ids) == len(PIECES):
            return ids
    return {}


def _hide(checkpoint: Checkpoint, ids: dict[str, int]) -> None:
    """No text encodes to the four tokens any more."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.kind == TokenizerKind.SENTENCEPIECE:
        kinds = dict.fromkeys(ids.values(), model_proto.CONTROL)
        tokenizer.data = model_proto.change(checkpoint.path, tokenizer.data, kinds)
        return
    document = json.loads(tokenizer.data)
    pieces = {PIECES[name]: token for name, token in ids.items()}
    merges = document["model"].get("merges") or []
    document["model"]["merges"] = [
        merge for merge in merges
        if "".join(merge.split(" ") if isinstance(merge, str) else merge) not in pieces
    ]  # fmt: skip
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    others = [token for token in document["added_tokens"] if token["content"] not in pieces]
    own = [{"id": i, "content": p, **flags, "special": True} for p, i in pieces.items()]
    document["added_tokens"] = sorted(others + own, key=lambda token: int(token["id"]))
    tokenizer.data = json.dumps(document, ensure_ascii=False).encode("utf-8")


def _refusal(config: Config, name: str, steps: bool) -> str | None:
    """Why a model with the tokens was not trained to use them, by NAME and shape; None: it was.
    STEPS: its template is that of Code Llama 70B Instruct."""
    if re.search(r"(?i)python", name):
        return "the Python variants of Code Llama were not trained for it"
    if (config.dim, config.n_layers) == (8192, 48):
        return "Code Llama 34B was not trained for it"
    if (config.dim, config.n_layers) == (8192, 80) and config.rope_theta < 1e6:
        # the base model has 1e6; Instruct was trained for it and Python was not
        if not steps and not re.search(r"(?i)instruct", name):
            return "its shape is Code Llama 70B Python's as well as Instruct's"
    return None
