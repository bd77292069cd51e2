"""An output matrix that is the embedding once more: stored once, in every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small_models
import torch
from test_gguf import write_gguf

from llama.checkpoints import load, tied
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.format import read
from llama.quant import Array

transformers = pytest.importorskip("transformers")
BOTH = ("tok_embeddings.weight", "output.weight")


def weights(alike: bool, dtype: str = "f32") -> dict[str, torch.Tensor]:
    found = small_models.weights(small_models.config(), dtype)
    return found | {BOTH[1]: found[BOTH[0]].clone()} if alike else found


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("embeddings", ["rows", "columns"])
def test_meta(tmp_path: Path, n: int, embeddings: str) -> None:
    for alike in (True, False):
        folder = tmp_path / str(alike)
        small_models.write_meta(folder, small_models.config(), weights(alike), n, embeddings)
        found = load(folder)
        assert found.config.tied == alike and (BOTH[1] in found.tensors) != alike
        note = "output.weight is tok_embeddings.weight once more: stored once (tied)"
        assert (note in found.notes) == alike
        convert(found, tmp_path / f"{alike}.bin", found.default_kind())
        assert read(tmp_path / f"{alike}.bin").config.tied == alike
    small, large = ((tmp_path / f"{alike}.bin").stat().st_size for alike in (True, False))
    assert small < large


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("place", [(0, 0), (20, 3), (43, 23)])
def test_the_last_bit_of_one_weight_counts(
    tmp_path: Path, dtype: str, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied, "CHUNK_BYTES", 4 * 24 * 5)  # 5 rows a chunk: 9 chunks
    both = weights(True, dtype)
    kind = torch.int32 if dtype == "f32" else torch.int16
    both[BOTH[1]].view(kind)[place] ^= 1
    assert not load(small_models.write_meta(tmp_path, small_models.config(), both)).config.tied


def test_hugging_face_is_transformers(tmp_path: Path) -> None:
    """Tied and both there: alike they are one, and else transformers' versions disagree."""
    shape = small_models.config()
    tokens = [3, 1, 4, 1, 5]
    small_models.write_hf(tmp_path / "one", shape, weights(True), tie_word_embeddings=True)
    found = load(tmp_path / "one")
    assert found.config.tied
    assert any("lm_head.weight is model.embed_tokens.weight once" in note for note in found.notes)
    convert(found, tmp_path / "a.bin", found.default_kind())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    with torch.inference_mode():
        right = model(torch.tensor([tokens])).logits[0].numpy()
    ours = small_models.forward(read(tmp_path / "a.bin"), tokens)
    assert np.abs(ours - right).max() <= 1e-4 * np.abs(right).max()

    small_models.write_hf(tmp_path / "two", shape, weights(False), tie_word_embeddings=True)
    with pytest.raises(LlamaError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        load(tmp_path / "two")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)  # 4 tied them
    settings = json.loads((tmp_path / "two/config.json").read_text())
    (tmp_path / "two/config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    assert not load(tmp_path / "two").config.tied  # as the message advises


def test_gguf(tmp_path: Path) -> None:
    shape = small_models.config(dim=64, head_dim=16, hidden_dim=96, tied=True)
    arrays = write_gguf(tmp_path / "a.gguf", shape)
    for change, alike in ((0.0, True), (1.0, False)):
        extra = {"output.weight": arrays[BOTH[0]] + np.float32(change)}
        write_gguf(tmp_path / "a.gguf", shape, extra=extra)
        assert load(tmp_path / "a.gguf").config.tied == alike
    q8 = gguf.GGMLQuantizationType.Q8_0  # the numbers count, not how they are stored
    values = gguf.quants.dequantize(gguf.quants.quantize(arrays[BOTH[0]], q8), q8)
    for change, alike in ((0.0, True), (1e-6, False)):
        extra = {"output.weight": values + np.float32(change)}
        write_gguf(tmp_path / "a.gguf", shape, q8, extra=extra)
        assert load(tmp_path / "a.gguf").config.tied == alike


def test_it_reads_little_and_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows asked for, and how many at once, whatever the size."""

    class Matrix:
        shape, dtype = (1000, 8), "f32"

        def __init__(self, differs: int) -> None:
            self.differs, self.asked, self.most = differs, 0, 0

        def rows(self, first: int, last: int) -> Array:
            self.asked, self.most = last, max(self.most, last - first)
            found = np.arange(first, last, dtype=np.float32)[:, None].repeat(8, 1)
            found[found == self.differs] = -1
            return found

    monkeypatch.setattr(tied, "CHUNK_BYTES", 4 * 8 * 16)
    heard: list[Any] = []
    for differs, end, alike in ((-5, 1000, True), (3, 16, False), (500, 512, False)):
        a, b = Matrix(-5), Matrix(differs)
        assert tied.same(a, b, lambda done, total: heard.append((done, total))) == alike
        assert a.asked == b.asked == end and a.most == b.most == 16
    assert heard[:2] == [(16, 1000), (32, 1000)] and heard[62] == (1000, 1000)
