"""An Engine without a model: logits are drawn from a hash of the sequence's tokens.

It holds callers to the contract of lib/llama.h more strictly than any C code could: positions
must continue, sequences must not be forgotten, and a sequence mixed up with another shows at
once as other text. It notes every call for tests that count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers

from llama.config import Head
from llama.errors import LlamaError
from llama.tokenizer import BYTE_OF

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer() -> bytes:
    """A tokenizer.json with one token a byte (id = byte + 3), behind three control tokens."""
    vocab = {char: byte + 3 for char, byte in BYTE_OF.items()}
    vocab |= {piece: token for token, piece in enumerate(SPECIAL)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(SPECIAL)
    return model.to_str().encode()


class FakeEngine:
    MAX_SEQUENCES = 256
    chosen = None

    def __init__(
        self, max_seq_len: int = 64, *, script: bytes | None = None, **config: Any
    ) -> None:
        """SCRIPT: what every sequence says, byte by byte, by position; else it babbles ASCII."""
        self.max_seq_len = max_seq_len
        self.config = SimpleNamespace(
            **{"vocab_size": 260, "tied": True, "bos_id": None, "eos_ids": (0,), "dtype": "f32",
               "head": Head.LM, "weight_bytes": 1000, "file_bytes": 1000, "step_bytes": 1000,
               "max_seq_len": max_seq_len, "rope_length": lambda prompt: 0,
               "untrained": lambda length: None, **config}
        )  # fmt: skip
        self.tokenizer = ("json", byte_tokenizer())
        self.meta: dict[str, Any] = {"template.family": "chatml"}
        self.script = script
        self.sequences: list[list[int]] = [[] for _ in range(self.MAX_SEQUENCES)]
        self.calls: list[int] = []  # rows of each forward
        self.kept: list[np.ndarray] = []
        self.fail_at: int | None = None  # the forward that fails
        self.before_forward = lambda: None
        self._busy = threading.Lock()
        self.closed = False

    def info(self) -> SimpleNamespace:
        return SimpleNamespace(
            device="fake", isa="none", threads=1, kv_kind="f32", kv_bytes=0, scratch_bytes=0,
            kv_bytes_per_position=8, page_positions=16,
        )  # fmt: skip

    def logits_of(self, tokens: list[int]) -> np.ndarray:
        digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        logits = np.full(self.config.vocab_size, -1e30, np.float32)
        if self.script is None:
            logits[3 + 32 : 3 + 127] = rng.normal(size=95)
        else:
            at = len(tokens) % len(self.script)
            logits[self.script[at] + 3 if self.script[at] != 255 else 0] = 1
        return logits

    def forward(self, tokens: Any, sequences: Any, positions: Any, want: Any = None,
                keep: bool = False, rope_lengths: Any = None,
                hidden: bool = False) -> np.ndarray | None:  # fmt: skip
        assert self._busy.acquire(blocking=False), "two threads in one engine"
        try:
            assert not self.closed
            self.before_forward()
            rows = list(
                zip(tokens, sequences, positions, want or [False] * len(tokens), strict=True)
            )
            assert 0 < len(rows) <= 256
            if self.fail_at == len(self.calls):
                self.fail_at = None
                raise LlamaError("the fake engine fails here")
            self.calls.append(len(rows))
            out = []
            for token, sequence, position, wanted in rows:
                held = self.sequences[sequence]
                assert position == len(held) < self.max_seq_len
                held.append(int(token))
                if wanted:
                    out.append(self.logits_of(held))
            if keep:
                self.kept = out
                return None
            return np.array(out, np.float32)
        finally:
            self._busy.release()

    def sample(
        self, row: int, params: Any, seen: Any, completion: int, position: int, said: int = 0,
        mu: Any = None,
    ) -> int:  # fmt: skip
        logits = self.kept[row]
        if params.temperature == 0:
            return int(np.argmax(logits))
        key = hashlib.sha256(f"{params.seed} {completion} {position}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(key[:8], "little"))
        return int(np.argmax(logits / params.temperature + rng.gumbel(size=len(logits))))

    def logprobs(self, row: int, token: int, n: int) -> tuple[float, dict[int, float]]:
        logits = self.kept[row].astype(float)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        order = np.argsort(-logprobs, kind="stable")[:n]
        return float(logprobs[token]), {int(one): float(logprobs[one]) for one in order}

    def length(self, sequence: int) -> int:
        return len(self.sequences[sequence])

    def trim(self, sequence: int, length: int) -> None:
        assert length <= len(self.sequences[sequence])
        del self.sequences[sequence][length:]

    def slide(self, sequence: int, first: int, count: int) -> None:
        """What moved is not what the same tokens are elsewhere: it gets other numbers."""
        held = self.sequences[sequence]
        assert 0 < count <= len(held) - first
        held[first:] = [token + 1_000_000 for token in held[first + count :]]

    def fork(self, source: int, target: int, length: int) -> None:
        assert source != target and length <= len(self.sequences[source])
        self.sequences[target] = self.sequences[source][:length]

    def close(self) -> None:
        self.closed = True


def told(results: Any) -> Any:
    """What a caller is told, but for how it was computed."""
    if isinstance(results, list):
        return [told(one) for one in results]
    return dataclasses.replace(results, prompt_seconds=0, decode_seconds=0, cached_tokens=0)
