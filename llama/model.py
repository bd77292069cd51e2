"""How a Llama works: the whole network in PyTorch, written to be read (arXiv:2302.13971).

A Llama turns token ids into logits, one score for each token that could come next. Each token
becomes a vector, the "residual stream"; n_layers times, attention adds what earlier tokens have
to say and a feed-forward network adds what it makes of that; a last matrix reads the scores off.

Read `forward` first, then the steps in its order. They have the names they have in
lib/cpu/forward.c, which does the same sums fast; here they are plain, so this file is also what
the tests believe. It loads any .bin, without the C library; quantised weights are decoded.

Shapes stand behind the lines. n is the tokens computed now, t all tokens so far, both of one
sequence. Weights are (outputs, inputs), so a matrix product is `x @ w.T`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from llama.config import Config, Head, Rope
from llama.format import read


class Cache:
    """What attention remembers of a sequence: each layer's keys and values, token by token.

    A token's key and value depend on it and the tokens before it, never on later ones, so they
    are computed once; that is why the next token costs one pass over one token.
    """

    def __init__(self, n_layers: int) -> None:
        self.keys: list[list[Tensor]] = [[] for _ in range(n_layers)]  # [layer][position]:
        self.values: list[list[Tensor]] = [[] for _ in range(n_layers)]  # (n_kv_heads, head_dim)

    @property
    def length(self) -> int:
        return len(self.keys[0])


class Transformer:
    """The network of the .bin at PATH. DTYPE is what it computes in; float64 judges float32."""

    def __init__(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        file = read(path)
        self.config: Config = file.config
        self.dtype = dtype
        self.weights = {name: torch.tensor(w, dtype=dtype) for name, w in file.tensors.items()}

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[int], cache: Cache | None = None, length: int = 0,
        hidden: bool = False,
    ) -> Tensor:  # fmt: skip
        """The logits after each of TOKENS, which follow those that CACHE holds and join them.
        LENGTH is the whole prompt's where they are but a part: dynamic scaling asks for it.
        HIDDEN asks for what the last matrix would read, (n, dim), instead of its logits."""
        cache = cache or Cache(self.config.n_layers)
        start = cache.length
        positions = torch.arange(start, start + len(tokens))  # (n)
        cos, sin = rope_angles(self.config, positions, max(length, start + len(tokens)))

        x = self.embed(tokens)  # (n, dim) the residual stream
        for layer in range(self.config.n_layers):
            y = self.attention_norm(x, layer)  # (n, dim)
            q, k, v = self.qkv(y, layer)  # q: (n, n_heads, head_dim)  k, v: (n, n_kv_heads, ..)
            q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
            keys, values = self.store(cache, layer, k, v)  # (t, n_kv_heads, head_dim)
            y = self.attend(q, keys, values, positions)  # (n, n_heads * head_dim)
            x = x + self.output(y, layer)  # (n, dim)

            y = self.ffn_norm(x, layer)  # (n, dim)
            y = self.gate_up(y, layer)  # (n, hidden_dim)
            x = x + self.down(y, layer)  # (n, dim)
        x = self.rms_norm(x, "norm")  # (n, dim)
        return x if hidden else self.logits(x)  # (n, vocab_size)

    # --- the steps, in order

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """A token's vector is its row of a table."""
        return self.weights["tok_embeddings.weight"][torch.tensor(tokens)]  # (n, dim)

    def attention_norm(self, x: Tensor, layer: int) -> Tensor:
        return self.rms_norm(x, f"layers.{layer}.attention_norm")  # (n, dim)

    def qkv(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """What each token asks for (q), what it answers to (k) and what it says (v), per head."""
        n, head_dim = len(x), self.config.head_dim
        q = self.linear(x, f"layers.{layer}.attention.wq")  # (n, n_heads * head_dim)
        k = self.linear(x, f"layers.{layer}.attention.wk")  # (n, n_kv_heads * head_dim)
        v = self.linear(x, f"layers.{layer}.attention.wv")
        return q.view(n, -1, head_dim), k.view(n, -1, head_dim), v.view(n, -1, head_dim)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates each pair of neighbours by an angle that grows with the position, so that q.k
        depends on how far apart two tokens are (arXiv:2104.09864, eq. 34). x: (n, heads, head_dim)
        """
        cos = cos.to(self.dtype)[:, None]  # (n, 1, head_dim / 2) the same for all heads
        sin = sin.to(self.dtype)[:, None]
        a, b = x[..., 0::2], x[..., 1::2]  # (n, heads, head_dim / 2) the pairs (a, b)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)  # (.., head_dim/2, 2)
        return turned.flatten(-2)  # (n, heads, head_dim)

    def store(self, cache: Cache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens' keys and values to the cache; returns those of all tokens."""
        cache.keys[layer].extend(k)  # n times (n_kv_heads, head_dim)
        cache.values[layer].extend(v)
        return torch.stack(cache.keys[layer]), torch.stack(cache.values[layer])

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """softmax(q k / sqrt(head_dim)) v, per head (arXiv:1706.03762, eq. 1).

        Groups of n_heads / n_kv_heads query heads share a key-value head (arXiv:2305.13245).
        """
        group = self.config.n_heads // self.config.n_kv_heads
        keys = keys.repeat_interleave(group, dim=1)  # (t, n_heads, head_dim)
        values = values.repeat_interleave(group, dim=1)
        scores = torch.einsum("nhd,thd->hnt", q, keys) / math.sqrt(self.config.head_dim)
        future = torch.arange(len(keys)) > positions[:, None]  # (n, t) tokens not yet said
        scores = scores.masked_fill(future, -math.inf)  # (n_heads, n, t)
        shares = scores.softmax(dim=-1)  # how much of each earlier token's value each head takes
        return torch.einsum("hnt,thd->nhd", shares, values).flatten(1)  # (n, n_heads * head_dim)

    def output(self, x: Tensor, layer: int) -> Tensor:
        return self.linear(x, f"layers.{layer}.attention.wo")  # (n, dim)

    def ffn_norm(self, x: Tensor, layer: int) -> Tensor:
        return self.rms_norm(x, f"layers.{layer}.ffn_norm")  # (n, dim)

    def gate_up(self, x: Tensor, layer: int) -> Tensor:
        """SwiGLU: one projection, smoothly switched on and off by another (arXiv:2002.05202,
        eq. 6 with the matrix after it in `down`). silu(x) = x / (1 + exp(-x))"""
        gate = self.linear(x, f"layers.{layer}.feed_forward.w1")  # (n, hidden_dim)
        up = self.linear(x, f"layers.{layer}.feed_forward.w3")  # (n, hidden_dim)
        return gate / (1 + torch.exp(-gate)) * up

    def down(self, x: Tensor, layer: int) -> Tensor:
        return self.linear(x, f"layers.{layer}.feed_forward.w2")  # (n, dim)

    def logits(self, x: Tensor) -> Tensor:
        """One score a token of the vocabulary; a tied model reads them off its own embedding. A
        model with another head scores its labels; one without a head gives x itself."""
        if self.config.head == Head.NONE:
            return x  # (n, dim)
        return self.linear(x, "tok_embeddings" if self.config.tied else "output")

    # --- what the steps are made of

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[name + ".weight"].T  # (n, inputs) -> (n, outputs)
        return y + self.weights.get(name + ".bias", 0)  # few models have one

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """Each token's vector scaled to root mean square 1, then each element by its learned
        weight (arXiv:1910.07467, eq. 4)."""
        mean_square = (x * x).mean(dim=-1, keepdim=True)  # (n, 1)
        scaled = x / torch.sqrt(mean_square + self.config.norm_eps)
        return scaled * self.weights[name + ".weight"]

    def slide(self, cache: Cache, first: int, count: int) -> None:
        """Forgets the tokens at [first, first + count) and moves those behind them down, their keys
        turned back by COUNT positions (arXiv:2309.17453, section 3.2); not with dynamic scaling."""
        angles = count * rope_frequencies(self.config)
        cos, sin = angles.cos()[None], -angles.sin()[None]  # (1, head_dim / 2), no attention factor
        for keys, values in zip(cache.keys, cache.values, strict=True):
            del keys[first : first + count], values[first : first + count]
            keys[first:] = [self.rope(key[None], cos, sin)[0] for key in keys[first:]]

    # --- and what it is for

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The COUNT likeliest tokens after TOKENS, one by one: all of text generation."""
        cache = Cache(self.config.n_layers)
        new: list[int] = []
        logits = self.forward(tokens, cache)  # the prompt in one go ...
        for _ in range(count):
            new.append(int(logits[-1].argmax()))
            logits = self.forward(new[-1:], cache)  # ... then each token by itself
        return new


def rope_frequencies(config: Config, length: int = 0) -> Tensor:
    """(head_dim / 2) radians a position: pair i turns at theta^(-2i / head_dim), the first pair
    fastest (arXiv:2104.09864, section 3.2.2), slowed where a model was stretched to a longer
    context. In float32, in transformers' order: far positions multiply every rounding."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    theta: float | Tensor = config.rope_theta
    if config.rope_scaling == Rope.DYNAMIC:
        theta = dynamic(config, length, *config.rope_numbers)
    frequencies: Tensor = 1 / theta ** (pairs / config.head_dim)
    if config.rope_scaling == Rope.LINEAR:
        return frequencies / config.rope_numbers[0]
    if config.rope_scaling == Rope.LLAMA3:
        return llama3(frequencies, *config.rope_numbers)
    if config.rope_scaling == Rope.YARN:
        return yarn(config, *config.rope_numbers)
    return frequencies


def rope_angles(config: Config, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (n, head_dim / 2) of POSITIONS (n) in a text of LENGTH, times yarn's attention
    factor."""
    factor = config.rope_numbers[4] if config.rope_scaling == Rope.YARN else 1.0
    angles = positions[:, None].float() * rope_frequencies(config, length)
    return angles.cos() * factor, angles.sin() * factor


def dynamic(config: Config, length: int, factor: float, original: float) -> float | Tensor:
    """NTK-aware scaling: a base that grows with the LENGTH of a text beyond the ORIGINAL, so that
    the slowest pair turns no further than it did. Keys that were stored stay as they are."""
    if length <= original:
        return config.rope_theta
    stretch = factor * torch.tensor(length) / original - (factor - 1)
    return config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))


def llama3(frequencies: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1's stretch: pairs that turn more than HIGH times within the ORIGINAL context stay,
    those that turn less than LOW times slow down by FACTOR, between them it is gradual."""
    turns = original / (2 * math.pi / frequencies)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


def yarn(
    config: Config, factor: float, original: float, fast: float, slow: float, _: float, whole: float
) -> Tensor:
    """As llama3, but the ramp runs over the pairs' numbers (arXiv:2309.00071, section 3.2)."""

    def pair(turns: float) -> float:
        """Which pair turns so many times within the original context."""
        ratio = math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        return config.head_dim * ratio

    low, high = pair(fast), pair(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    numbers = torch.arange(config.head_dim // 2, dtype=torch.float32)
    stay = 1 - ((numbers - low) / (high - low or 0.001)).clamp(0, 1)
    waves = config.rope_theta ** (2 * numbers / config.head_dim)
    return 1 / (factor * waves) * (1 - stay) + 1 / waves * stay
