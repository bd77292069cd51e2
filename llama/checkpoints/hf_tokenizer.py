"""Which tokenizer a Hugging Face directory has, the ids around a text, and its chat template.

Several files have a say: generation_config.json and config.json name ids, tokenizer_config.json
names pieces, tokenizer.json shows whether a text starts with bos at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama.checkpoints import added_tokens, tokenizer_file
from llama.checkpoints.checkpoint import Options, Tokenizer
from llama.checkpoints.family import family_by_name, family_of
from llama.checkpoints.settings import Settings
from llama.errors import LlamaError
from llama.format import TokenizerKind, Value

# Classes whose texts start without bos unless add_bos_token says otherwise.
WITHOUT_BOS = ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
NAMES = ("tokenizer.model", "tokenizer.json")


def load(
    path: Path, config: Settings, vocab_size: int, options: Options, notes: list[str]
) -> tuple[Tokenizer, dict[str, Value]]:
    """The tokenizer with its ids, and the template's meta entries."""
    said = Settings.read(path / "tokenizer_config.json", needed=False)
    generation = Settings.read(path / "generation_config.json", needed=False)
    tokenizer = _choose(path, vocab_size, options, notes)
    jinja = _template(path, said)
    meta: dict[str, Value] = {}
    if tokenizer.kind == TokenizerKind.SENTENCEPIECE and options.tokenizer is None:
        added = added_tokens.extend(path, tokenizer, said, vocab_size, notes)
        if added and said.values.get("legacy") is False:
            meta["tokenizer.spaces_first"] = 1
    if jinja is not None:
        meta["template.jinja"] = jinja
        family = family_of(jinja)
        if family is not None:
            meta["template.family"] = family
    elif family_by_name(path.resolve().name) == "vicuna":
        meta["template.family"] = "vicuna"
        notes.append("chat template vicuna: inferred from the directory's name")
    ids = _pieces(tokenizer)
    bos = _first_id("bos", generation, config, said, ids, vocab_size)
    if not _starts_with_bos(said, tokenizer, jinja):
        bos = []
    tokenizer.bos_id = bos[0] if bos else None
    eos = _first_id("eos", generation, config, said, ids, vocab_size)
    end = ids.get(_piece(said, "eos_token"), -1)  # what the template ends a turn with
    if 0 <= end < vocab_size:
        eos.append(end)
    tokenizer.eos_ids = tuple(dict.fromkeys(eos))[:8] or tokenizer.eos_ids
    return tokenizer, meta


def frame(path: Path, tokenizer: Tokenizer) -> dict[str, Value]:
    """The ids that the source's tokenizer puts around a text and around a pair of texts, as the
    meta entry tokenizer.frame; nothing where they are the begin token before each."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    usual: dict[str, list[Any]] = {"single": [*begin, "A"], "pair": [*begin, "A", *begin, "B"]}
    data = tokenizer.data if tokenizer.kind == TokenizerKind.JSON else b""
    if not data and (path / "tokenizer.json").is_file():  # it decides even where it is not taken
        data = tokenizer_file.read(path / "tokenizer.json").data
    if data:
        from tokenizers import Tokenizer as Library

        library = Library.from_str(data.decode("utf-8"))
        library.no_padding()
        library.no_truncation()
        found = {"single": _frame(library.encode("a")), "pair": _frame(library.encode("a", "a"))}
    else:
        said = Settings.read(path / "tokenizer_config.json", needed=False)
        end = [_pieces(tokenizer).get(_piece(said, "eos_token"), *tokenizer.eos_ids[:1])]
        single = [*begin, "A", *(end if said.flag("add_eos_token", False) else [])]
        found = {"single": single, "pair": [*single, *begin, "B", *single[len(begin) + 1 :]]}
    return {} if found == usual else {"tokenizer.frame": json.dumps(found)}


def _frame(encoding: Any) -> list[Any]:
    """The special tokens of an encoding, with "A" and "B" where the texts' own tokens stand."""
    parts: list[Any] = []
    for token, of in zip(encoding.ids, encoding.sequence_ids, strict=True):
        if of is None:
            parts.append(token)
        elif "AB"[of] not in parts:
            parts.append("AB"[of])
    return parts


def _choose(path: Path, vocab_size: int, options: Options, notes: list[str]) -> Tokenizer:
    """SentencePiece's own file, unless tokenizer.json has tokens that it lacks."""
    tokenizer = tokenizer_file.beside(path, NAMES, options, notes)
    larger = path / "tokenizer.json"
    sentencepiece = tokenizer.kind == TokenizerKind.SENTENCEPIECE
    if options.tokenizer is None and sentencepiece and larger.is_file():
        other = tokenizer_file.read(larger)
        if tokenizer.vocab_size < other.vocab_size <= vocab_size:
            notes.append(
                f"tokenizer.json taken: {other.vocab_size} tokens, "
                f"tokenizer.model has {tokenizer.vocab_size}"
            )
            return other
    return tokenizer


def _template(path: Path, said: Settings) -> str | None:
    separate = path / "chat_template.jinja"
    if separate.is_file():
        try:
            return separate.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LlamaError(f"{separate}: cannot read: {error}") from None
    found = said.values.get("chat_template")
    if isinstance(found, list):  # several by name
        named = [each for each in found if isinstance(each, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _pieces(tokenizer: Tokenizer) -> dict[str, int]:
    """Piece -> id of the special tokens that a configuration may name."""
    if tokenizer.kind == TokenizerKind.JSON:
        from tokenizers import Tokenizer as Library

        library = Library.from_str(tokenizer.data.decode("utf-8"))
        return dict(library.get_vocab(with_added_tokens=True))
    if tokenizer.kind == TokenizerKind.SENTENCEPIECE:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=tokenizer.data)
        return {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
    return tokenizer.special


def _piece(said: Settings, key: str) -> str:
    value = said.values.get(key)
    if isinstance(value, dict):  # an AddedToken
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _first_id(
    name: str,
    generation: Settings,
    config: Settings,
    said: Settings,
    ids: dict[str, int],
    vocab_size: int,
) -> list[int]:
    """bos or eos ids from the first file that names any that the model has."""
    for settings in (generation, config):
        value = settings.values.get(f"{name}_token_id")
        found = value if isinstance(value, list) else [value]
        good = [n for n in found if type(n) is int and 0 <= n < vocab_size]
        if good:
            return good
    token = ids.get(_piece(said, f"{name}_token"), -1)
    return [token] if 0 <= token < vocab_size else []


def _starts_with_bos(said: Settings, tokenizer: Tokenizer, jinja: str | None) -> bool:
    if isinstance(said.values.get("add_bos_token"), bool):
        return bool(said.values["add_bos_token"])
    if said.values.get("tokenizer_class") in WITHOUT_BOS:
        return False
    if tokenizer.kind != TokenizerKind.JSON:
        return True
    document: Any = json.loads(tokenizer.data)
    if '"SpecialToken"' in json.dumps(document.get("post_processor")):
        return True
    # Llama 3's first release forgot the post-processor, and its template writes bos itself.
    return jinja is not None and family_of(jinja) == "llama3"
