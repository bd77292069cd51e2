"""Tokens put beside a SentencePiece model, and spaces at a prompt's beginning only: the ids of
transformers, and of its documented procedure done with sentencepiece alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import random_texts
import small_models
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Library

from llama.checkpoints import Options, load
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.generate import Llama
from llama.quant import Kind
from llama.templates import ChatTemplate
from llama.tokenizer import Tokenizer, open_tokenizer

SHAPE = small_models.config(vocab_size=32003)
MARKS = {"<|im_end|>": 32000, "<|im_start|>": 32001}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOG = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes?\n"},
          {"role": "user", "content": "a  b <|im_end|> c"}]  # fmt: skip


def directory(data: Path, folder: Path, legacy: bool | None, **changes: Any) -> Path:
    """A ChatML finetune of Llama 2: two special tokens and a common one beside the model."""
    small_models.write_hf(folder, SHAPE, small_models.weights(SHAPE), bos_token_id=1,
                          eos_token_id=2)  # fmt: skip
    model = (data / "tokenizers/llama2_tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(model)
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    decoder = {
        str(token): {"content": text, "special": True, **flags} for text, token in MARKS.items()
    }
    for token, text in enumerate(("<unk>", "<s>", "</s>")):
        decoder[str(token)] = {"content": text, "special": True, **flags}
    decoder["32002"] = {"content": "<tool>", "special": False, **flags}
    said = {
        "added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "<|im_end|>",
        "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "chat_template": CHATML,
    }  # fmt: skip
    said |= {} if legacy is None else {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | changes))
    return folder


def opened(folder: Path) -> Llama:
    checkpoint = load(folder)
    convert(checkpoint, folder / "a.bin", Kind.F32)
    return Llama(folder / "a.bin")


def procedure(model: Any, text: str, legacy: bool) -> list[int]:
    """transformers 4's LlamaTokenizer.tokenize: a text cut at its added tokens; what stands
    between is SentencePiece's, behind <unk> and without a space unless it begins the text."""
    ids: list[int] = []
    for number, part in enumerate(re.split("(<tool>|<.im_end.>|<.im_start.>)", text)):
        if part in MARKS or part == "<tool>":
            ids.append(MARKS.get(part, 32002))
        elif part and (legacy or number == 0):
            ids += model.encode(part)
        elif part:
            ids += model.encode("☺" + part)[2:]
    return ids


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_transformers_procedure(data: Path, tmp_path: Path, legacy: bool) -> None:
    folder = directory(data, tmp_path / "hf", legacy)
    plain = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    spelled = ["<|im_start|>", "<|im_end|>", "user", " a", "\n", "b c", "<s>", "x<"]
    with opened(folder) as llm:
        ours = llm.tokenizer
        assert ours.size == 32003 and ours.spaces_first is not legacy
        assert {p: ours.control_id(p) for p in MARKS} == MARKS and ours.eos_ids == (2, 32000)
        for seed, text in enumerate(random_texts.texts(300, 21)):
            mixed = text + spelled[seed % 8] + spelled[seed * 3 % 8] + text
            if "<s>" not in mixed and "</s>" not in mixed and "<unk>" not in mixed:
                expect = procedure(plain, mixed, legacy)
                assert ours.encode(mixed, parse_special=True) == expect, mixed
            ids = ours.encode(mixed)
            assert ids == plain.encode(mixed) and not any(map(ours.is_control, ids))
        # a common token is one in any text, and SentencePiece puts no space behind it
        assert ours.encode("a<tool>b") == [263, 32002, 29890]
        assert ours.decode([263, 32002, 29890]) == "a<tool>b"


def test_a_template_is_transformers(data: Path, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    folder = directory(data, tmp_path / "hf", False)
    model = json.loads((data / "tokenizers/hf_llama2_tokenizer.json").read_text("utf-8"))["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    theirs = LlamaTokenizer(vocab=model["vocab"], merges=merges, legacy=False)
    theirs.add_special_tokens({"additional_special_tokens": list(MARKS)})
    theirs.chat_template = CHATML
    with opened(folder) as llm:
        assert llm.template.family == "chatml"
        harmless = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in DIALOG]
        text = theirs.apply_chat_template(harmless, tokenize=False, add_generation_prompt=True)
        expect = theirs.encode(text, add_special_tokens=False)
        assert llm.template.encode(harmless) == expect
        assert llm.tokenizer.encode("user\n", continues=True) == expect[1:3]
        ids = llm.template.encode(DIALOG)
        assert [i for i in ids if i in MARKS.values()] == [32001, 32000] * 3 + [32001]


def test_older_directories(data: Path, tmp_path: Path) -> None:
    """added_tokens.json says no more than ids; special_tokens_map.json which are special."""
    folder = directory(data, tmp_path / "hf", None, added_tokens_decoder={})
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 32000, "<x>": 32002}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    found = load(folder)
    assert "3 tokens added to tokenizer.model's 32000: <pad>, <nothing 32001>, <x>" in found.notes
    model = SentencePieceProcessor(model_proto=found.tokenizer.data)
    assert model.is_control(32000) and model.is_control(32001) and not model.is_control(32002)
    assert model.encode("a<x>b<pad>")[1] == 32002 and 32000 not in model.encode("a<x>b<pad>")
    # as Llama 2's first directories had it: a padding token that the network does not know
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 32003, "<x>": 10**12}))
    found = load(folder)
    assert found.tokenizer.vocab_size == 32000
    assert "added tokens without an embedding left out: <pad>, <x>" in found.notes
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": "y"}))
    with pytest.raises(LlamaError, match="expected an id, found 'y'"):
        load(folder)
    chosen = Options(tokenizer=data / "tokenizers/llama2_tokenizer.model")
    assert load(folder, chosen).tokenizer.vocab_size == 32000


def test_a_piece_may_have_another_name(data: Path, tmp_path: Path) -> None:
    """A special token in the place of one of the model's own."""
    decoder = {"31999": {"content": "<|end|>", "special": True}}
    folder = directory(data, tmp_path / "hf", None, added_tokens_decoder=decoder)
    with opened(folder) as llm:
        assert llm.tokenizer.control_id("<|end|>") == 31999
        assert not any(map(llm.tokenizer.is_control, llm.tokenizer.encode("a <|end|> 给")))


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"x": {"content": "a"}}, r"added_tokens_decoder\['x'\]: expected an id and an object"),
        ({"32000": {"content": ""}}, "content: expected a text, found ''"),
        ({"32000": {"content": "<x>", "lstrip": True}}, "'<x>' is a common token with lstrip"),
        ({"32000": {"content": "the"}, "32001": {"content": "the"}}, "makes no tokenizer"),
        ([], "added_tokens_decoder: expected an object"),
    ],
)
def test_bad_tokens_are_one_line(
    data: Path, tmp_path: Path, decoder: Any, message: str
) -> None:
    folder = directory(data, tmp_path / "hf", None, added_tokens_decoder=decoder)
    with pytest.raises(LlamaError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# --- a space at the beginning only, in a tokenizer.json


@pytest.fixture(scope="module")
def first(data: Path) -> dict[str, Any]:
    """Llama 2's tokenizer.json as transformers 5 writes it, with ChatML's marks."""
    found: dict[str, Any] = json.loads(
        (data / "tokenizers/hf_llama2_tokenizer.json").read_text("utf-8")
    )
    found["normalizer"] = None
    found["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    flags = found["added_tokens"][2]
    found["added_tokens"] += [{**flags, "id": i, "content": p} for p, i in MARKS.items()]
    return found


def of(document: dict[str, Any]) -> Tokenizer:
    return open_tokenizer("json", json.dumps(document).encode(), 32003, 1, [2], {})


def test_metaspace_first_is_tokenizers(first: dict[str, Any]) -> None:
    ours, library = of(first), Library.from_str(json.dumps(first))
    assert ours.spaces_first
    template = ChatTemplate(ours, {"template.family": "chatml"})
    harmless = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in DIALOG]
    string = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in harmless)
    expect = library.encode(string + "<|im_start|>assistant\n", add_special_tokens=False).ids
    assert template.encode(harmless) == expect
    for text in random_texts.texts(500, 22):
        assert ours.encode(text, parse_special=True) == library.encode(
            text, add_special_tokens=False
        ).ids
        # behind a mark, as the library encodes it there
        string = "<|im_start|>" + text
        behind = library.encode(string, add_special_tokens=False).ids[1:]
        if not any(mark in text for mark in ("<s>", "</s>", "<unk>", *MARKS)):
            assert ours.encode(text, continues=True) == behind, text


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_other_schemes(first: dict[str, Any], scheme: str) -> None:
    document = {**first, "pre_tokenizer": {**first["pre_tokenizer"], "prepend_scheme": scheme}}
    ours, library = of(document), Library.from_str(json.dumps(document))
    assert not ours.spaces_first
    string = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    template = ChatTemplate(ours, {"template.family": "chatml"})
    ids = template.encode([{"role": "user", "content": "Hi"}])
    assert ids == library.encode(string, add_special_tokens=False).ids
    assert ours.encode("a", continues=True) == [29874]
