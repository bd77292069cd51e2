"""Text to token ids and back: SentencePiece BPE and byte-level BPE, each by its own library.

The libraries encode; decoding is done here, from one table: the bytes that each id adds to the
text. Text is then whatever those bytes are as UTF-8, so a stream and a whole list decode alike
and no byte is lost between two tokens. Control tokens (begin, end, turn marks) add no bytes, and
text never encodes to one unless the caller says parse_special=True.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import operator
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llama.errors import LlamaError, refused

SPACE = "\u2581"  # SentencePiece writes a space so
# Meta's Llama 3 tokenizer: the split before BPE, and the limits that keep tiktoken's regular
# expression from recursing too deep on very long inputs (llama3/tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    # SentencePiece writes one U+FFFD for each byte that is part of no character; Python, Rust
    # and so byte-level tokenizers write one for each broken sequence.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("llama-each-byte", _each_byte)


class Tokenizer(ABC):
    """What every tokenizer does; the subclasses say how text is cut and what an id's bytes are."""

    kind = "none"
    errors = "replace"  # the codec's handler of invalid UTF-8
    strips_space = False  # whether decoding drops the space before the very first word
    control_cuts = False  # whether a control token ends a character that is not complete
    strips_all = False  # and every other one before it, as where runs of spaces are one
    spaces_first = False  # encoding puts it there at a prompt's beginning only, not after a mark

    def __init__(
        self, size: int, vocab_size: int, bos_id: int | None, eos_ids: Iterable[int],
        control: Mapping[str, int],
    ) -> None:  # fmt: skip
        if size > vocab_size:
            raise LlamaError(
                f"the tokenizer has {size} tokens and the model {vocab_size}: "
                "they do not belong together"
            )
        self.size = size  # ids at or above it are padding of the embedding and have no text
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.control = dict(control)
        self._pieces = {token: piece for piece, token in control.items()}
        self._control_ids = {*self._pieces, *self.eos_ids}
        if bos_id is not None:
            self._control_ids.add(bos_id)
        self._bytes: dict[int, bytes] = {}

    @abstractmethod
    def _encode(self, text: str, parse_special: bool, continues: bool) -> list[int]: ...

    @abstractmethod
    def _piece_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes, or part of them, that a token which is no control token stands for."""

    def _drops_space(self, token: int) -> bool:
        return self.strips_space and self.token_bytes(token).startswith(b" ")

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, parse_special: bool = False,
        continues: bool = False,
    ) -> list[int]:  # fmt: skip
        """Token ids of TEXT. BOS and EOS add the model's begin and (first) end token, where it
        has them. Control tokens written in TEXT are plain text unless PARSE_SPECIAL. CONTINUES:
        other text stands before it, so that no space is put before its first word."""
        if not isinstance(text, str):
            raise LlamaError(f"text must be a str, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LlamaError(
                f"text has half a surrogate pair at character {error.start}, which is no "
                "character of Unicode"
            ) from None
        ids = self._encode(text, parse_special, continues)
        if not parse_special and not self._control_ids.isdisjoint(ids):
            found = next(self.piece(token) for token in ids if token in self._control_ids)
            raise LlamaError(
                f"text holds {found!r}, which this tokenizer cannot tell from its control token"
            )
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos and self.eos_ids:
            ids.append(self.eos_ids[0])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of IDS without its control tokens; invalid UTF-8 becomes U+FFFD. As in
        SentencePiece, the space before the first word is dropped where the encoder adds one."""
        decoder = StreamDecoder(self)
        return "".join([decoder.feed(self.check(token)) for token in ids]) + decoder.finish()

    def token_bytes(self, token: int) -> bytes:
        """What TOKEN adds to the text: b"" for a control token and for padding."""
        found = self._bytes.get(token)
        if found is None:
            token = self.check(token)
            known = token < self.size and token not in self._control_ids
            found = self._bytes[token] = self._piece_bytes(token) if known else b""
        return found

    def written(self, token: int) -> bytes:
        """What TOKEN, below size, is called in the vocabulary: a control token's name, or the
        bytes that it adds to the text, whether or not the model takes it for an end token."""
        return self._pieces[token].encode() if token in self._pieces else self._piece_bytes(token)

    def check(self, token: int) -> int:
        """TOKEN as an int; LlamaError if it is none of the model's."""
        try:
            number = operator.index(token)
        except TypeError:
            raise LlamaError(f"a token id must be an int, found {token!r}") from None
        if isinstance(token, bool) or not 0 <= number < self.vocab_size:
            raise LlamaError(f"token id must be 0 to {self.vocab_size - 1}, found {token!r}")
        return number

    def piece(self, token: int) -> str:
        """TOKEN as a person may read it: a control token's name, or its text with the bytes of
        a partial character as \\xNN."""
        if token in self._pieces:
            return self._pieces[token]
        return self.token_bytes(token).decode("utf-8", "backslashreplace")

    def shown(self, token: int) -> str:
        """piece() in quotes on one line, for a person: as repr has it, a lone byte as \\xNN."""
        if token in self._pieces:
            return repr(self._pieces[token])
        text = self.token_bytes(token).decode("utf-8", "surrogateescape")
        inner = "".join(
            f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff"
            else "\\'" if char == "'" else repr(char)[1:-1]
            for char in text
        )  # fmt: skip
        return f"'{inner}'"

    def is_control(self, token: int) -> bool:
        return token in self._control_ids

    def control_id(self, piece: str) -> int:
        """The id of the control token written PIECE; LlamaError if there is none."""
        try:
            return self.control[piece]
        except KeyError:
            raise LlamaError(f"the tokenizer has no control token {piece!r}") from None


class StreamDecoder:
    """Ids in, text out, whole characters only. The pieces joined, finish()'s too, are decode()'s
    text. FRESH is False when the ids continue a text: their first word keeps its space."""

    def __init__(self, tokenizer: Tokenizer, fresh: bool = True) -> None:
        self._tokenizer = tokenizer
        self._fresh = fresh
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)

    def feed(self, token: int) -> str:
        """The characters that TOKEN completes, "" if none."""
        data = self._tokenizer.token_bytes(token)
        if not data and self._tokenizer.control_cuts:
            return self.finish()
        if self._fresh and data:
            if self._tokenizer._drops_space(token):
                data = data[1:]
            self._fresh = self._tokenizer.strips_all and not data
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What an unfinished character at the end becomes."""
        return self._utf8.decode(b"", final=True)


class NoTokenizer(Tokenizer):
    """Stands in for the tokenizer that a file does not hold: it knows ids and no text."""

    def __init__(self, vocab_size: int, bos_id: int | None, eos_ids: Iterable[int]) -> None:
        super().__init__(0, vocab_size, bos_id, eos_ids, {})

    def _refuse(self) -> LlamaError:
        return LlamaError("this model file holds no tokenizer; give token ids")

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, parse_special: bool = False,
        continues: bool = False,
    ) -> list[int]:  # fmt: skip
        raise self._refuse()

    def decode(self, ids: Iterable[int]) -> str:
        raise self._refuse()

    def _encode(self, text: str, parse_special: bool, continues: bool) -> list[int]:
        raise self._refuse()

    def _piece_bytes(self, token: int) -> bytes:
        return b""


class SentencePiece(Tokenizer):
    """Llama 1 and 2: a SentencePiece ModelProto."""

    kind = "sentencepiece"
    errors = "llama-each-byte"
    control_cuts = True

    def __init__(
        self, data: bytes, vocab_size: int, bos_id: int | None, eos_ids: Iterable[int]
    ) -> None:
        from sentencepiece import SentencePieceProcessor

        self._stand_in: str | None = None  # found when it is first needed
        self._model: Any = SentencePieceProcessor()
        with refused("the SentencePiece tokenizer cannot be read"):
            self._model.LoadFromSerializedProto(data)
        size = self._model.GetPieceSize()
        with refused("the SentencePiece tokenizer's pieces cannot be read"):  # not UTF-8
            pieces = [self._model.IdToPiece(token) for token in range(size)]
        control = {pieces[token]: token for token in range(size) if self._model.IsControl(token)}
        super().__init__(size, vocab_size, bos_id, eos_ids, control)
        # The library does not tell its dummy prefix setting: see what it does with a first word.
        first = next((t for t in range(size) if pieces[t][:1] == SPACE), None)
        if first is not None:
            self.strips_space = not self._model.Decode([first, first]).startswith(
                self._piece_bytes(first).decode() * 2
            )
            self.strips_all = self._model.Decode([self._model.PieceToId(SPACE)] * 2) == ""

    def _encode(self, text: str, parse_special: bool, continues: bool) -> list[int]:
        ids: list[int] = []
        for part in split_at(self.control, text) if parse_special else [text]:
            if part in self.control and parse_special:
                ids.append(self.control[part])
            elif continues:
                ids += self._continue(part)
            else:
                ids += self._model.EncodeAsIds(part)
            continues = continues or self.spaces_first
        return ids

    def _continue(self, text: str) -> list[int]:
        """TEXT behind a character that joins nothing, as in Meta's encode_infilling
        (codellama/llama/tokenizer.py)."""
        if not self.strips_space:
            return list(self._model.EncodeAsIds(text))
        if self._stand_in is None:
            self._stand_in = self._find_stand_in()
        ids: list[int] = self._model.EncodeAsIds(self._stand_in + text)
        return ids[len(self._model.EncodeAsIds(self._stand_in)) :]

    def _find_stand_in(self) -> str:
        model = self._model
        pieces: list[str] = [model.IdToPiece(token) for token in range(model.GetPieceSize())]
        inside = Counter(char for piece in pieces for char in set(piece))
        for char in ["☺", *(piece for piece in pieces if len(piece) == 1 and piece != SPACE)]:
            if inside[char] == 1 and model.PieceToId(char) != model.unk_id():
                return char
        raise LlamaError("this tokenizer always puts a space before a text")

    def _piece_bytes(self, token: int) -> bytes:
        piece: str = self._model.IdToPiece(token)
        if self._model.IsByte(token):
            return bytes([int(piece[3:5], 16)])  # "<0xE2>"
        if self._model.IsUnknown(token):
            return " \u2047 ".encode()  # what the library writes for it
        return piece.replace(SPACE, " ").encode()

    def _drops_space(self, token: int) -> bool:
        return self.strips_space and self._model.IdToPiece(token).startswith(SPACE)


class HuggingFace(Tokenizer):
    """A tokenizer.json: byte-level BPE, or SentencePiece BPE in Hugging Face's dress."""

    kind = "json"

    def __init__(
        self, data: bytes, vocab_size: int, bos_id: int | None, eos_ids: Iterable[int]
    ) -> None:
        self._plain = self._load(data)
        self._plain.encode_special_tokens = True
        self._data = data
        # the ones beside it, by (parses control tokens, continues), once they are asked for
        self._others: dict[tuple[bool, bool], Any] = {}
        vocabulary: dict[str, int] = self._plain.get_vocab(with_added_tokens=True)
        control = {
            added.content: token
            for token, added in self._plain.get_added_tokens_decoder().items() if added.special
        }  # fmt: skip
        size = max(vocabulary.values(), default=-1) + 1
        super().__init__(size, vocab_size, bos_id, eos_ids, control)
        cutter, decoder = self._plain.pre_tokenizer, self._plain.decoder
        self.spaces_first = cutter is not None and any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"
            for step in _steps(json.loads(cutter.__getstate__()))
        )
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
        kinds = {step["type"] for step in steps}
        self._byte_level = kinds == {"ByteLevel"}
        self._byte_fallback = "ByteFallback" in kinds
        if self._byte_fallback:
            self.errors = "llama-each-byte"
        known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not kinds or not (self._byte_level or kinds <= known):
            raise LlamaError(
                f"tokenizer.json has the decoder {'+'.join(sorted(kinds)) or 'none'}, which this "
                "engine does not know"
            )
        self.strips_space = any(
            (step["type"] == "Strip" and step["start"] > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )

    @staticmethod
    def _load(data: bytes) -> Any:
        import tokenizers

        with refused("tokenizer.json cannot be read"):
            loaded = tokenizers.Tokenizer.from_buffer(data)
        loaded.no_truncation()
        loaded.no_padding()
        return loaded

    def _encode(self, text: str, parse_special: bool, continues: bool) -> list[int]:
        model = self._plain
        if parse_special or continues:
            which = parse_special, continues
            if which not in self._others:
                other = self._load(_without_space(self._data) if continues else self._data)
                other.encode_special_tokens = not parse_special
                self._others[which] = other
            model = self._others[which]
        with refused("tokenizer.json cannot encode this text"):
            return list(model.encode(text, add_special_tokens=False).ids)

    def _piece_bytes(self, token: int) -> bytes:
        piece: str | None = self._plain.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            try:
                return bytes([BYTE_OF[char] for char in piece])
            except KeyError:  # an added token: written as it is
                return piece.encode()
        if self._byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


class Tiktoken(Tokenizer):
    """Llama 3 as Meta ships it: "base64 rank" lines; the special tokens stand beside them."""

    kind = "tiktoken"

    def __init__(
        self, data: bytes, vocab_size: int, bos_id: int | None, eos_ids: Iterable[int],
        special: Mapping[str, int],
    ) -> None:  # fmt: skip
        import tiktoken

        self._ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                piece, rank = line.split()
                self._ranks[base64.b64decode(piece, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise LlamaError(
                    f"the tiktoken ranks hold no 'base64 rank' in line {number}: {line[:40]!r}"
                ) from None
        self._piece_of = {rank: piece for piece, rank in self._ranks.items()}
        size = max([*self._ranks.values(), *special.values()], default=-1) + 1
        super().__init__(size, vocab_size, bos_id, eos_ids, special)
        for byte in range(256):
            if bytes([byte]) not in self._ranks:
                raise LlamaError(f"the tiktoken ranks lack the byte {byte:#04x}")
        with refused("the tiktoken ranks cannot be used"):
            self._model = tiktoken.Encoding(
                "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=self._ranks,
                special_tokens=dict(special),
            )  # fmt: skip

    def _encode(self, text: str, parse_special: bool, continues: bool) -> list[int]:
        allowed = set(self.control) if parse_special else set[str]()
        ids: list[int] = []
        for part in _bounded(text):
            ids += self._model.encode(part, allowed_special=allowed, disallowed_special=())
        return ids

    def _piece_bytes(self, token: int) -> bytes:
        return self._piece_of.get(token, b"")


def open_tokenizer(
    kind: str, data: bytes, vocab_size: int, bos_id: int | None, eos_ids: Iterable[int],
    meta: Mapping[str, Any],
) -> Tokenizer:  # fmt: skip
    """The tokenizer that a .bin holds: KIND and DATA as Engine.tokenizer gives them."""
    eos_ids = tuple(eos_ids)
    if kind == "sentencepiece":
        found = SentencePiece(data, vocab_size, bos_id, eos_ids)
        found.spaces_first = meta.get("tokenizer.spaces_first") == 1
        return found
    if kind == "json":
        return HuggingFace(data, vocab_size, bos_id, eos_ids)
    if kind == "tiktoken":
        special = _special(meta.get("tokenizer.special", "{}"))
        return Tiktoken(data, vocab_size, bos_id, eos_ids, special)
    if kind == "none":
        return NoTokenizer(vocab_size, bos_id, eos_ids)
    raise LlamaError(f"tokenizer kind must be sentencepiece, json, tiktoken or none, found {kind}")


def split_at(pieces: Iterable[str], text: str) -> list[str]:
    """TEXT cut into the PIECES it holds (the longest of those that start together) and what
    stands between them; empty parts are left out."""
    longest = sorted(pieces, key=len, reverse=True)
    if not longest:
        return [text] if text else []
    return [part for part in re.split(f"({'|'.join(map(re.escape, longest))})", text) if part]


def _special(text: Any) -> dict[str, int]:
    try:
        special = json.loads(text)
        if all(isinstance(token, int) and token >= 0 for token in special.values()):
            return dict(special)
    except (TypeError, ValueError, AttributeError):
        pass
    raise LlamaError('tokenizer.special must be JSON, {"piece": id}')


def _steps(part: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, in order."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield dict(part)
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(key, ()):
            yield from _steps(step)


def _without_space(data: bytes) -> bytes:
    """A tokenizer.json that puts no space before a text."""
    document = json.loads(data)
    kept = [s for s in _steps(document.get("normalizer")) if s["type"] != "Prepend"]
    document["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    steps = list(_steps(document.get("pre_tokenizer")))
    for step in steps:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)  # how older files say it
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    if steps:
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return json.dumps(document).encode()


def _bounded(text: str) -> Iterator[str]:
    """Meta's cut of very long inputs: at every 400,000 characters, and inside runs of more than
    25,000 characters that are all space or all not."""
    if len(text) <= MAX_RUN_CHARS:
        yield text
        return
    for first in range(0, len(text), MAX_ENCODE_CHARS):
        part = text[first : first + MAX_ENCODE_CHARS]
        start, run, space = 0, 0, part[0].isspace()
        for at, char in enumerate(part):
            if char.isspace() != space:
                run, space = 1, not space
                continue
            run += 1
            if run > MAX_RUN_CHARS:
                yield part[start:at]
                start, run = at, 1
        yield part[start:]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTE_OF = _byte_level_alphabet()
