"""Embeddings: pooled hidden states against numpy on transformers' own."""

from __future__ import annotations

import threading
from pathlib import Path

import head_models
import numpy as np
import pytest
import small_models
import torch
from fake_engine import FakeEngine
from head_models import FRAMES, TEXTS, opened, text_model

from llama import Llama
from llama.config import Head, Rope
from llama.errors import LlamaError

transformers = head_models.transformers
MANY = [*TEXTS, "longer " * 30, "b" * 250]


def hidden_states(model: object, ids: list[int]) -> np.ndarray:
    base = getattr(model, "model", model)
    with torch.inference_mode():
        found: np.ndarray = base(torch.tensor([ids])).last_hidden_state[0].numpy()
    return found.astype(np.float64)


def pooled(hidden: np.ndarray, pooling: str, normalize: bool) -> np.ndarray:
    found: np.ndarray = hidden[-1] if pooling == "last" else hidden.mean(axis=0)
    return found / np.sqrt(np.sum(found * found)) if normalize else found


@pytest.mark.parametrize("head", [Head.NONE, Head.LM, Head.SEQUENCE], ids=lambda head: head.name)
@pytest.mark.parametrize("frame", ["", "both"])
def test_embeddings_are_transformers(tmp_path: Path, head: Head, frame: str) -> None:
    model, tokenizer = text_model(tmp_path / "hf", head, frame=FRAMES.get(frame, ""))
    tokenizer.split_special_tokens = True
    with opened(tmp_path / "hf") as llm:
        all_ids = [llm.text_ids(text) for text in MANY]
        if head != Head.LM:  # whose texts only get the begin token
            assert all_ids == [tokenizer(text).input_ids for text in MANY]
        states = [hidden_states(model, ids) for ids in all_ids]
        for pooling in ("last", "mean"):
            for normalize in (True, False):
                found = llm.embed(MANY, pooling, normalize)  # type: ignore[arg-type]
                assert found.shape == (len(MANY), 32) and found.dtype == np.float32
                for hidden, ours in zip(states, found, strict=True):
                    right = pooled(hidden, pooling, normalize)
                    assert np.abs(ours - right).max() <= 1e-4 * np.abs(right).max()
                    if normalize:
                        assert np.linalg.norm(ours) == pytest.approx(1, abs=1e-6)
            for number, one in enumerate([MANY[0], all_ids[1], MANY[2]]):  # alone, to the last bit
                alone = llm.embed(one, pooling, False)  # type: ignore[arg-type]
                assert alone.shape == (32,) and np.array_equal(alone, found[number])
        assert np.array_equal(llm.embed(MANY), llm.embed(MANY, "last", True))
        assert llm.embed([]).shape == (0, 32)
        for wrong in ("first", None, 0):
            with pytest.raises(LlamaError, match="pooling must be 'last' or 'mean'"):
                llm.embed("a", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_shapes_at_random(tmp_path: Path, seed: int) -> None:
    """All rope scalings and biases; texts longer than what the model was trained for, and under
    dynamic scaling each of its own length."""
    from llama import checkpoints

    shape = head_models.random_shape(Head.NONE, seed)
    model = small_models.transformers_llama(shape, seed=seed)
    model.save_pretrained(tmp_path / "hf")
    checkpoints.export(tmp_path / "hf", tmp_path / "a.bin", say=lambda line: None)
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, shape.vocab_size, n).tolist() for n in (1, 9, 24, 25, 40)]
    with Llama(tmp_path / "a.bin", max_seq_len=40, threads=1) as llm:
        for pooling in ("last", "mean"):
            found = llm.embed(texts, pooling, False)  # type: ignore[arg-type]
            for ids, ours in zip(texts, found, strict=True):
                right = pooled(hidden_states(model, ids), pooling, False)
                assert np.abs(ours - right).max() <= 1e-4 * np.abs(right).max()


def test_beginnings_in_common_are_read_once(tmp_path: Path) -> None:
    text_model(tmp_path / "hf", Head.NONE)
    texts = [f"{'the same beginning ' * 8}{end}" for end in ("a", "bc", "def", "a", "")]
    with opened(tmp_path / "hf") as llm:
        together = llm.embed(texts)
        assert llm.computed_tokens < len(texts[0]) + 40
        with opened(tmp_path / "hf") as fresh:
            for text, ours in zip(texts, together, strict=True):
                assert np.array_equal(fresh.embed(text), ours)
        before = llm.computed_tokens
        llm.embed(texts[0])
        assert llm.computed_tokens <= before + 2
        llm.embed(texts[0], "mean")  # needs every position
        assert llm.computed_tokens >= before + len(texts[0])


def test_threads_and_many_texts(tmp_path: Path) -> None:
    """More texts than run together, from two threads: each as if alone."""
    text_model(tmp_path / "hf", Head.NONE)
    texts = [f"text number {n} " * (1 + n % 5) for n in range(60)]
    with opened(tmp_path / "hf") as llm:
        alone = np.stack([llm.embed(text, "mean") for text in texts])
        found: dict[int, np.ndarray] = {}

        def work(n: int) -> None:
            found[n] = llm.embed(texts, "mean")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(found[n], alone) for n in range(3))


def test_passes_are_small_and_an_error_leaves_nothing_behind() -> None:
    engine = FakeEngine(max_seq_len=600)
    llm = Llama.on(engine)  # type: ignore[arg-type]
    llm._batches._chunk = 48
    whole = llm.logits(list(range(3, 259)) * 2)
    assert whole.shape == (512, 260) and max(engine.calls) <= 256 and len(engine.calls) > 2
    assert np.array_equal(whole[99], engine.logits_of(list(range(3, 103))))
    engine.fail_at = len(engine.calls) + 1
    llm._batches._chunk = 48
    with pytest.raises(LlamaError, match="the fake engine fails here"):
        llm.logits(list(range(3, 259)))
    slots = llm._batches.slots
    assert not slots._busy
    assert np.array_equal(llm.logits(list(range(3, 259))), whole[:256])


def test_a_zero_vector_stays_zero(tmp_path: Path) -> None:
    from llama.format import Record, Writer, expected_tensors
    from llama.quant import Kind

    shape = small_models.config(head=Head.NONE)
    records = [Record(name, Kind.F32, size) for name, size in expected_tensors(shape).items()]
    with Writer(tmp_path / "a.bin", shape, records) as writer:
        for record in records:
            writer.write(record.name, np.zeros(record.shape, np.float32))
    with Llama(tmp_path / "a.bin") as llm:
        assert not llm.embed([[1, 2], [3]]).any()


def test_a_language_models_embedding_keeps_its_tied_matrix(tmp_path: Path) -> None:
    """A tied language model and a dynamic one: hidden states are not logits."""
    shape = small_models.config(tied=True, rope_scaling=Rope.DYNAMIC, rope_numbers=(2.0, 32.0))
    path = small_models.write_bin(tmp_path / "a.bin", shape)
    with Llama(path) as llm:
        hidden = llm.embed([1, 2, 3], normalize=False)
        table = llm._engine.model.rows(0)
        assert np.allclose(table @ hidden, llm.logits([1, 2, 3])[-1], rtol=1e-4, atol=1e-5)
