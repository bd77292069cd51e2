"""Models with heads, small and random, and how they are opened: for the tests of their numbers and
of what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tokenizers
from fake_engine import byte_tokenizer

from llama import Llama, checkpoints
from llama.config import Config, Head, Rope

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LENGTH, TRAINED = 40, 24  # tokens that are read, and positions that the models say they know
ROPES: dict[Rope, tuple[float, ...]] = {
    Rope.PLAIN: (), Rope.LINEAR: (4.0,), Rope.LLAMA3: (8.0, 1.0, 4.0, 16.0),
    Rope.YARN: (4.0, 20.0, 8.0, 1.0, 1.25, 1.0), Rope.DYNAMIC: (2.0, float(TRAINED)),
}  # fmt: skip
HEADS = [Head.SEQUENCE, Head.ANSWER, Head.TOKEN, Head.NONE, Head.LM]


def random_shape(head: Head, seed: int) -> Config:
    """Every rope scaling with and without biases, in turn; the rest is drawn."""
    rng = np.random.default_rng(100 * head + seed)
    n_kv, group = (int(n) for n in rng.integers(1, 4, 2))
    rope = list(ROPES)[seed % 5]
    return small_models.config(
        vocab_size=int(rng.integers(30, 100)), dim=n_kv * group * int(rng.integers(4, 9)),
        hidden_dim=int(rng.integers(8, 60)), head_dim=2 * int(rng.integers(2, 10)),
        n_layers=int(rng.integers(1, 4)), n_heads=n_kv * group, n_kv_heads=n_kv,
        max_seq_len=TRAINED, rope_theta=float(rng.choice([500.0, 1e4, 5e5])),
        rope_scaling=rope, rope_numbers=ROPES[rope], attention_bias=seed // 5 in (1, 3),
        mlp_bias=seed // 5 in (2, 3), head=head, n_labels=labels_of(head, rng),
        output_bias=head == Head.ANSWER or (head == Head.TOKEN and seed % 4 > 0),
    )  # fmt: skip


def labels_of(head: Head, rng: np.random.Generator) -> int:
    if head in (Head.SEQUENCE, Head.TOKEN):
        return int(rng.integers(1, 40))
    return 2 if head == Head.ANSWER else 0


def far(ours: Any, right: Any) -> float:
    return float(np.abs(ours - right).max() / np.abs(right).max())


def text_model(folder: Path, head: Head, n_labels: int = 3, frame: str = "", **changes: Any) -> Any:
    """transformers' model and tokenizer, saved in FOLDER; a token a byte."""
    n = n_labels if head in (Head.SEQUENCE, Head.TOKEN) else 2 * (head == Head.ANSWER)
    shape = small_models.config(
        vocab_size=259, dim=32, max_seq_len=256, head=head, n_labels=n, attention_bias=True
    )
    model = small_models.transformers_llama(shape, **changes)
    model.save_pretrained(folder)
    library = tokenizers.Tokenizer.from_str(byte_tokenizer().decode())
    if frame:
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        single, pair = frame.split(",")
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=special
        )
    library.save(str(folder / "tokenizer.json"))
    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return model, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def opened(folder: Path, **options: Any) -> Llama:
    path = folder.with_suffix(".bin")
    checkpoints.export(folder, path, force=True, say=lambda line: None)
    return Llama(path, **{"threads": 1, **options})


FRAMES = {
    "begin": "<|im_start|> $A,<|im_start|> $A <|im_start|>:1 $B:1",
    "both": "<|im_start|> $A <|im_end|>,<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
    "twice": "<|im_end|> <|im_end|> $A,$B:1 <|im_end|> $A",
}
TEXTS = ["Hello", "a 😀 and <|im_end|> é\n", " x", "the first", "the first too", "the first of all"]
