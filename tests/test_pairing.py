"""A tokenizer of another vocabulary is refused in one line, whatever the checkpoint's form."""

from __future__ import annotations

import shutil
from pathlib import Path

import code_llama
import pytest
import small_models
import test_gguf

from llama.checkpoints import Options, load
from llama.errors import LlamaError
from llama.generate import Llama


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Path:
    return data / "tokenizers/llama2_tokenizer.model"


def checkpoint(form: str, rows: int, folder: Path, tokenizer: Path) -> Path:
    """A model with an embedding of ROWS and Llama 2's 32,000 tokens, or Code Llama's as GGUF."""
    shape = small_models.config(vocab_size=rows, dim=4, hidden_dim=4, head_dim=2, n_heads=2,
                                n_kv_heads=2, n_layers=1)  # fmt: skip
    if form == "GGUF":
        data = tokenizer.parent.parent
        write = code_llama.gguf_lists
        test_gguf.write_gguf(folder / "a.gguf", shape, more=lambda w: write(data, w, {}))
        return folder / "a.gguf"
    write_form = small_models.write_meta if form == "Meta" else small_models.write_hf
    found = write_form(folder / "model", shape, small_models.weights(shape))
    name = "hf_llama2_tokenizer.json" if form == "json" else tokenizer.name
    shutil.copy(tokenizer.parent / name,
                found / ("tokenizer.json" if form == "json" else "tokenizer.model"))  # fmt: skip
    return found


@pytest.mark.parametrize("form", ["Meta", "HF", "json", "GGUF"])
def test_rows_and_tokens(tmp_path: Path, tokenizer: Path, form: str) -> None:
    tokens = 32016 if form == "GGUF" else 32000
    for rows, message in (
        (512, f"the tokenizer has {tokens} tokens, the model only 512: they do not belong togeth"),
        (49152, f"the tokenizer has {tokens} tokens, the model 49152, more than padding explains"),
    ):
        folder = tmp_path / str(rows)
        folder.mkdir()
        with pytest.raises(LlamaError, match=message) as caught:
            load(checkpoint(form, rows, folder, tokenizer))
        assert "\n" not in str(caught.value)
    padded = load(checkpoint(form, 32064, tmp_path, tokenizer))
    assert f"{32064 - tokens} ids beyond the tokenizer's {tokens} tokens: padding" in padded.notes


def test_llama2c(data: Path, tokenizer: Path) -> None:
    for weights, other, message in (
        ("stories260K.bin", tokenizer, "the tokenizer has 32000 tokens, the model only 512"),
        ("stories15M.bin", data / "tokenizers/tok512.bin", "has 512 tokens, the model 32000, more"),
        ("stories15M.bin", data / "tokenizers/llama3_tokenizer.model", "128256 tokens, the model"),
    ):
        with pytest.raises(LlamaError, match=message):
            load(data / "weights" / weights, Options(tokenizer=other))


def test_ids_that_the_model_has_not(stories: Path) -> None:
    with Llama(stories) as llm:
        for ids in ([1, 512], [-1], [1 << 40]):
            with pytest.raises(LlamaError, match="token id must be 0 to 511, found"):
                llm.generate(ids)
            with pytest.raises(LlamaError, match="token id must be 0 to 511, found"):
                llm.logits(ids)
