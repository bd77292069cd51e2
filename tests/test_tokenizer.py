"""Tokenizers against the libraries and answers that others made, on texts meant to hurt."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import SPECIAL, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.errors import LlamaError
from llama.tokenizer import StreamDecoder, Tokenizer, open_tokenizer, split_at

LLAMA2 = {"vocab_size": 32000, "bos_id": 1, "eos_ids": [2]}
LLAMA3 = {"vocab_size": 128256, "bos_id": 128000, "eos_ids": [128001, 128009]}


def torture() -> list[str]:
    """Texts that tokenizers get wrong."""
    texts = [
        "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\t\t\n \t", "a", " a", "a ",
        "  a  b   c", "\0", "a\0b", "\0\0", "\x01\x02\x7f", "0", "12", "123", "1234",
        "12345678901234567890", "3.14159", "1,000,000.00",
        "don't DON'T we'll WE'LL I'm y'all're 'tis they've he'd 's 'S", "x" * 1000,
        "supercalifragilistic" * 40, "ab" * 500, " " * 300, "\n" * 100, "=" * 77, "!?" * 30,
        "👩‍👩‍👧‍👦", "🏳️‍🌈🧑🏿‍🚀🇩🇪🇯🇵", "👍🏽 ok", "שלום עולם", "مرحبا بالعالم", "אב‎ab‏גד",
        "e\u0301 ñ n\u0303 Å A\u030a", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L", "你好，世界！",
        "こんにちは　世界", "안녕하세요", "ไทยภาษา", "हिन्दी में", "ភាសាខ្មែរ",
        "Ⅷ ½ ²³ ﬁ ﬀ Ǆ ß ẞ İ ı", "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚𝟛", "\ufeffBOM", "\u200b\u200c\u200d\u2060",
        "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g", "\u2581", "▁▁a", "a▁b", "<s>", "</s>",
        "<unk>", "a<s>b</s>", "<0x41>", "<0x0A>", "<|begin_of_text|>", "<|eot_id|><|im_end|>",
        "[INST] <<SYS>>", "def f(x):\n    return x  # ok\n\n\n", "http://a.b/c?d=e&f=%20",
        "\\n \\t \"'`", "$€£¥₿", "\ufffd", "\uffff", "\U0010ffff", "\ue000", "ab\ud7ffcd",
        "CamelCaseWORDSandNumbers123mixed456", "the cat sat on the mat. " * 20,
    ]  # fmt: skip
    texts += [chr(code) for code in range(256)]
    texts += ["".join(map(chr, range(256))), " ".join(map(chr, range(256)))]
    rng = random.Random(1)
    for plane in range(17):
        codes = [rng.randrange(plane << 16, (plane + 1) << 16) for _ in range(60)]
        chars = [chr(c) for c in codes if not 0xD800 <= c < 0xE000]
        texts += ["".join(chars), " ".join(chars), *chars[:8]]
    alphabet = "ab eEtT  \n\t'.,!0123456789äß漢🙂\u0301\u200d<|>/s_▁\r\u00a0"
    texts += ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(600)]
    return texts


def read(data: Path, name: str) -> bytes:
    return (data / "tokenizers" / name).read_bytes()


@pytest.fixture(scope="module")
def sentence(data: Path) -> Tokenizer:
    return open_tokenizer("sentencepiece", read(data, "llama2_tokenizer.model"), meta={}, **LLAMA2)


@pytest.fixture(scope="module")
def sentence_json(data: Path) -> Tokenizer:
    return open_tokenizer("json", read(data, "hf_llama2_tokenizer.json"), meta={}, **LLAMA2)


@pytest.fixture(scope="module")
def special(data: Path) -> dict[str, int]:
    described = json.loads(read(data, "hf_llama3_tokenizer.json"))
    return {added["content"]: added["id"] for added in described["added_tokens"]}


@pytest.fixture(scope="module")
def ranks(data: Path, special: dict[str, int]) -> Tokenizer:
    meta = {"tokenizer.special": json.dumps(special)}
    return open_tokenizer("tiktoken", read(data, "llama3_tokenizer.model"), meta=meta, **LLAMA3)


@pytest.fixture(scope="module")
def ranks_json(data: Path) -> Tokenizer:
    return open_tokenizer("json", read(data, "hf_llama3_tokenizer.json"), meta={}, **LLAMA3)


@pytest.fixture(params=["sentence", "sentence_json", "ranks", "ranks_json"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


# --- the answers of others


def known(data: Path, name: str) -> Iterator[tuple[str, list[int]]]:
    stem = data / "vocab" / f"ggml-vocab-llama-{name}.gguf"
    texts = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    answers = Path(f"{stem}.out").read_text().split("\n")
    for text, line in zip(texts, answers, strict=True):
        yield text, [int(word) for word in line.split()]


@pytest.mark.parametrize(
    ("name", "fixtures"),
    [("spm", ["sentence", "sentence_json"]), ("bpe", ["ranks", "ranks_json"])],
)
def test_llama_cpps_answers(
    data: Path, name: str, fixtures: list[str], request: pytest.FixtureRequest
) -> None:
    for fixture in fixtures:
        tokenizer = request.getfixturevalue(fixture)
        for text, ids in known(data, name):
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == text


def test_the_tiny_vocabularies(data: Path) -> None:
    described = json.loads((data / "tiny_hf" / "hf_tokenizer_cases.json").read_text())
    n = 0
    for vocabulary in described.values():
        file = data / "tiny_hf" / vocabulary["tokenizer"]
        if not file.exists():  # one answer has lost its vocabulary
            continue
        kind = "json" if file.suffix == ".json" else "sentencepiece"
        tokenizer = open_tokenizer(kind, file.read_bytes(), 1 << 20, None, [], {})
        for case in vocabulary["cases"]:
            # one text holds a control token, which was meant
            assert tokenizer.encode(case["text"], parse_special=True) == case["ids"]
            assert tokenizer.decode(case["ids"]) == case["decoded"]
            n += 1
    assert n > 20


# --- the libraries themselves


def test_sentencepiece_is_sentencepiece(data: Path, sentence: Tokenizer) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(
        model_proto=read(data, "llama2_tokenizer.model")
    )
    rng = random.Random(2)
    for text in torture():
        ids = original.encode(text)
        assert sentence.encode(text) == ids, repr(text)
        assert sentence.decode(ids) == original.decode(ids), repr(text)
    broken = [0xC3 + 3, 2, 0xA9 + 3]  # a character in two, with a control token inside
    assert sentence.decode(broken) == original.decode(broken) == "\ufffd\ufffd"
    for _ in range(2000):  # any ids: broken UTF-8, begin tokens in the middle, unknown tokens
        low = rng.choice([3, 260, 32000])
        ids = [rng.randrange(low) for _ in range(rng.randrange(1, 12))]
        assert sentence.decode(ids) == original.decode(ids), ids


@pytest.mark.parametrize("name", ["hf_llama2_tokenizer.json", "hf_llama3_tokenizer.json"])
def test_json_is_tokenizers(data: Path, name: str, request: pytest.FixtureRequest) -> None:
    import tokenizers

    ours = request.getfixturevalue("sentence_json" if "llama2" in name else "ranks_json")
    plain = tokenizers.Tokenizer.from_buffer(read(data, name))
    plain.encode_special_tokens = True
    special = tokenizers.Tokenizer.from_buffer(read(data, name))
    for text in torture():
        ids = plain.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == plain.decode(ids), repr(text)
        parsed = special.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_special=True) == parsed, repr(text)
    if "llama3" in name:
        rng = random.Random(3)
        for _ in range(2000):
            ids = [rng.randrange(rng.choice([256, 128256])) for _ in range(rng.randrange(1, 12))]
            assert ours.decode(ids) == plain.decode(ids, skip_special_tokens=True), ids


def meta_splits(text: str) -> Iterator[str]:
    """Meta's llama3/tokenizer.py, its procedure in other words: cut into 400,000 characters,
    then close a piece whenever 25,000 characters in a row were all space or all not."""
    for at in range(0, len(text), 400_000):
        piece, run, kind = "", 0, None
        for char in text[at : at + 400_000]:
            run = run + 1 if char.isspace() == kind else 1
            kind = char.isspace()
            if run > 25_000:
                yield piece
                piece, run = "", 1
            piece += char
        yield piece


def test_tiktoken_is_metas_procedure(
    data: Path, ranks: Tokenizer, ranks_json: Tokenizer, special: dict[str, int]
) -> None:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    pattern = json.loads(read(data, "hf_llama3_tokenizer.json"))["pre_tokenizer"]
    original = tiktoken.Encoding(
        "original",
        pat_str=pattern["pretokenizers"][0]["pattern"]["Regex"],
        mergeable_ranks=load_tiktoken_bpe(str(data / "tokenizers" / "llama3_tokenizer.model")),
        special_tokens=special,
    )
    for text in torture():
        ids = original.encode(text, allowed_special=set(), disallowed_special=())
        assert ranks.encode(text) == ids == ranks_json.encode(text), repr(text)
        assert ranks.decode(ids) == original.decode(ids) == text
        parsed = original.encode(text, allowed_special="all")
        assert ranks.encode(text, parse_special=True) == parsed
    rng = random.Random(4)
    for _ in range(2000):
        ids = [rng.randrange(rng.choice([256, 128000])) for _ in range(rng.randrange(1, 12))]
        assert ranks.decode(ids) == original.decode(ids), ids


def test_very_long_inputs_are_cut_as_meta_cuts_them(ranks: Tokenizer) -> None:
    from llama.tokenizer import _bounded

    long = [
        "a" * 25_001, "x " * 13_000, " " * 60_000 + "a" * 60_000, "ab" * 210_000,
        "\n" * 25_000 + "b", "word " * 90_000, ("y" * 25_000 + " ") * 3,
    ]  # fmt: skip
    for text in long:
        parts = list(_bounded(text))
        assert parts == list(meta_splits(text)) and "".join(parts) == text
    text = "ab" * 15_000
    assert ranks.encode(text) == [i for part in meta_splits(text) for i in ranks.encode(part)]


# --- control tokens


def test_text_never_becomes_a_control_token(each: Tokenizer) -> None:
    rng = random.Random(5)
    pieces = [*each.control, "a", " ", "<", "|>", "<|", "s>", "</", "\n", "▁"]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 6)))
        assert not any(each.is_control(token) for token in each.encode(text)), text
        if "▁" not in text:
            assert each.decode(each.encode(text)) == text


def test_parse_special_is_explicit(each: Tokenizer) -> None:
    bos = each.piece(each.bos_id or 0)
    assert each.encode(f"{bos}hi", parse_special=True) == each.encode("hi", bos=True)
    assert each.encode(bos) != [each.bos_id]
    assert each.control_id(bos) == each.bos_id
    with pytest.raises(LlamaError, match="no control token '<|nothing|>'".replace("|", r"\|")):
        each.control_id("<|nothing|>")


def test_bos_and_eos(each: Tokenizer) -> None:
    plain = each.encode("hi")
    assert each.encode("hi", bos=True, eos=True) == [each.bos_id, *plain, each.eos_ids[0]]
    assert each.decode([each.bos_id or 0, *plain, each.eos_ids[0]]) == "hi"
    assert each.is_control(each.bos_id or 0) and not each.is_control(plain[0])


def test_pieces_for_display(sentence: Tokenizer, ranks: Tokenizer) -> None:
    pieces = [sentence.piece(token) for token in (1, 2, 3 + 0xE2, 15043)]
    assert pieces == ["<s>", "</s>", "\\xe2", " Hello"]
    assert ranks.piece(128009) == "<|eot_id|>"


# --- streams


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.feed(token) for token in ids]) + decoder.finish()


def test_a_stream_is_decode(each: Tokenizer) -> None:
    """Text that is broken between any two tokens arrives whole."""
    for text in torture():
        ids = each.encode(text)
        decoder = StreamDecoder(each)
        pieces = [decoder.feed(token) for token in ids]
        assert decoder.finish() == ""
        assert "".join(pieces) == each.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 259), max_size=30))
def test_any_bytes_in_any_pieces(ids: list[int]) -> None:
    tokenizer = open_tokenizer("json", byte_tokenizer(), 260, None, [], {})
    data = bytes(token - 3 for token in ids if 3 <= token < 259)
    assert stream(tokenizer, ids) == data.decode("utf-8", "replace") == tokenizer.decode(ids)


def test_invalid_bytes_appear_once_they_are_certain() -> None:
    tokenizer = open_tokenizer("json", byte_tokenizer(), 260, None, [], {})
    decoder = StreamDecoder(tokenizer)
    fed = [decoder.feed(byte + 3) for byte in b"\xf0\x9f\x98\x80\xf0\x9fa\xff\xc3"]
    assert fed == ["", "", "", "\U0001f600", "", "", "\ufffda", "\ufffd", ""]
    assert decoder.finish() == "\ufffd"


def test_a_continuation_keeps_its_space(sentence: Tokenizer, sentence_json: Tokenizer) -> None:
    for tokenizer in (sentence, sentence_json):
        ids = tokenizer.encode("Hello world")
        goes_on = StreamDecoder(tokenizer, fresh=False)
        assert "".join(map(goes_on.feed, ids[1:])) == " world"
        afresh = StreamDecoder(tokenizer)
        assert "".join(map(afresh.feed, ids[1:])) == "world"


# --- what is refused


def test_bad_text_and_ids(each: Tokenizer) -> None:
    with pytest.raises(LlamaError, match="surrogate pair at character 1"):
        each.encode("a\ud800b")
    with pytest.raises(LlamaError, match="must be a str, found bytes"):
        each.encode(b"a")  # type: ignore[arg-type]
    for bad in (-1, each.vocab_size, 1 << 70, 1.5, "a", None, True):
        with pytest.raises(LlamaError, match="token id must be"):
            each.decode([bad])  # type: ignore[list-item]


def test_ids_beyond_the_vocabulary_have_no_text(data: Path) -> None:
    padded = open_tokenizer(
        "sentencepiece", read(data, "llama2_tokenizer.model"), 32064, 1, [2], {}
    )
    assert padded.decode([15043, 32050]) == "Hello" and padded.piece(32050) == ""


@pytest.mark.parametrize(
    ("kind", "file"),
    [("sentencepiece", "llama2_tokenizer.model"), ("json", "hf_llama3_tokenizer.json"),
     ("tiktoken", "llama3_tokenizer.model")],
)  # fmt: skip
def test_a_wrong_pairing_is_refused(data: Path, kind: str, file: str) -> None:
    with pytest.raises(LlamaError, match=r"has \d+ tokens and the model 512: they do not belong"):
        open_tokenizer(kind, read(data, file), 512, None, [], {})


@pytest.mark.parametrize("kind", ["sentencepiece", "json", "tiktoken"])
@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"\0" * 100, b"{}", b"AAAA x\n", b"AA 1 2\n"]
)
def test_broken_tokenizers_are_one_line(kind: str, content: bytes) -> None:
    try:
        open_tokenizer(kind, content, 512, None, [], {})
    except LlamaError as error:
        assert "\n" not in str(error)
    else:
        assert content == b""  # nothing in it: no text can be encoded, and none is lost


def test_special_must_be_a_table(data: Path) -> None:
    for bad in ("", "[]", '{"a": "b"}', '{"a": -1}', 5):
        with pytest.raises(LlamaError, match=r"tokenizer\.special must be JSON"):
            open_tokenizer("tiktoken", b"QQ== 0\n", 512, None, [], {"tokenizer.special": bad})


def test_no_tokenizer() -> None:
    none = open_tokenizer("none", b"", 512, 1, [2], {})
    for use in (lambda: none.encode("a"), lambda: none.decode([1])):
        with pytest.raises(LlamaError, match="holds no tokenizer; give token ids"):
            use()
    assert none.check(511) == 511 and none.is_control(1) and not none.is_control(5)
    with pytest.raises(LlamaError, match="tokenizer kind must be"):
        open_tokenizer("other", b"", 512, None, [], {})


def test_split_at() -> None:
    assert split_at(["<a>", "<a>b"], "x<a>b<a>") == ["x", "<a>b", "<a>"]
    assert split_at([], "x") == ["x"] and split_at([], "") == []
    assert split_at(SPECIAL, "") == []


def test_a_decoder_that_is_not_known_is_refused() -> None:
    described: dict[str, Any] = json.loads(byte_tokenizer())
    for decoder, named in (({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
                           (None, "none")):  # fmt: skip
        described["decoder"] = decoder
        with pytest.raises(LlamaError, match=f"decoder {named}"):
            open_tokenizer("json", json.dumps(described).encode(), 512, None, [], {})
