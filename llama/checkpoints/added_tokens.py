"""Tokens that Hugging Face's library puts beside a SentencePiece model, as finetunes add them
(ChatML marks on Llama 2): tokenizer_config.json's added_tokens_decoder, or added_tokens.json.

They become pieces of the model: control tokens where they are special, user-defined ones, which
every text that spells them holds, where they are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama.checkpoints import model_proto
from llama.checkpoints.checkpoint import Tokenizer
from llama.checkpoints.settings import Settings
from llama.errors import LlamaError


def extend(
    path: Path, tokenizer: Tokenizer, said: Settings, vocab_size: int, notes: list[str]
) -> bool:
    """Puts the added tokens of the directory PATH into a SentencePiece TOKENIZER; SAID is its
    tokenizer_config.json. Whether there were any that the model lacked. Those from VOCAB_SIZE on,
    which the network does not know (a padding token, often), are left out."""
    from sentencepiece import SentencePieceProcessor

    tokens = _tokens(path, said)
    model = SentencePieceProcessor(model_proto=tokenizer.data)
    size = model.vocab_size()
    beyond = [(text, 0) for token, (text, _) in tokens.items() if token >= max(size, vocab_size)]
    if beyond:
        notes.append(f"added tokens without an embedding left out: {_few(beyond)}")
        tokens = {token: one for token, one in tokens.items() if token < max(size, vocab_size)}
    kinds: dict[int, int] = {}
    names: dict[int, str] = {}
    for token, (text, special) in tokens.items():
        if token < size and special and not model.is_unknown(token):
            kinds[token] = model_proto.CONTROL
            if model.id_to_piece(token) != text:
                names[token] = text
    added = []
    for token in range(size, max(tokens, default=-1) + 1):
        text, special = tokens.get(token, (f"<nothing {token}>", True))
        added.append((text, model_proto.CONTROL if special else model_proto.USER_DEFINED))
    kinds = {token: kind for token, kind in kinds.items()
             if token in names or not model.is_control(token)}  # fmt: skip
    if kinds or added:
        tokenizer.data = model_proto.change(path, tokenizer.data, kinds, added, names)
    if added:
        tokenizer.vocab_size = size + len(added)
        notes.append(f"{len(added)} tokens added to tokenizer.model's {size}: {_few(added)}")
    return bool(added)


def _few(added: list[tuple[str, int]]) -> str:
    names = [text for text, _ in added]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _tokens(path: Path, said: Settings) -> dict[int, tuple[str, bool]]:
    """Id -> (text, whether it is special)."""
    tokens: dict[int, tuple[str, bool]] = {}
    file = Settings.read(path / "added_tokens.json", needed=False)
    special = _special_names(said) | _special_names(
        Settings.read(path / "special_tokens_map.json", needed=False)
    )
    for text, token in file.values.items():
        if type(token) is not int or token < 0:
            raise LlamaError(f"{file.path}: {text[:60]!r}: expected an id, found {token!r}")
        tokens[token] = (text, text in special)
    for key, value in said.inside("added_tokens_decoder").values.items():
        where = f"{said.path}: added_tokens_decoder[{key[:20]!r}]"
        if not key.isdecimal() or not isinstance(value, dict):
            raise LlamaError(f"{where}: expected an id and an object")
        content = value.get("content")
        if not isinstance(content, str) or not content:
            raise LlamaError(f"{where}: content: expected a text, found {content!r}")
        is_special = bool(value.get("special"))
        flags = [f for f in ("lstrip", "rstrip", "single_word") if value.get(f)]
        if flags and not is_special:
            raise LlamaError(f"{where}: {content[:60]!r} is a common token with {flags[0]}, which "
                             "this engine does not know")  # fmt: skip
        tokens[int(key)] = (content, is_special)
    return tokens


def _special_names(settings: Settings) -> set[str]:
    """The pieces that a settings file names as begin, end, padding, additional ones and so on."""

    def texts(value: Any) -> list[Any]:
        if isinstance(value, list):
            return [text for one in value for text in texts(one)]
        return [value.get("content")] if isinstance(value, dict) else [value]

    found = [texts(v) for k, v in settings.values.items()
             if k.endswith("_token") or k.endswith("special_tokens")]  # fmt: skip
    return {text for some in found for text in some if isinstance(text, str)}
