"""Random texts that tokenizers may get wrong: every plane of Unicode, and mixtures of what is
special to one of them. The same seed gives the same texts."""

from __future__ import annotations

import random
from collections.abc import Iterator

SPELLINGS = [
    "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0x0A>", "<0xFF>", "<|begin_of_text|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "[INST]",
    "[/INST]", "<<SYS>>", "<", "|>", "<|", "</", "s>", "▁", "▁▁", "<PRE>", " <PRE>",
    "▁<MID>", "<EOT", "<step>",
]  # fmt: skip
PIECES = [
    *SPELLINGS, "'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'D", "don't", "y'all'd", "’s",
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", " \n ", "\u00a0", "\u3000",
    "\u2028", "\u200b", "\u0085", "\0", "\x01", "\x7f", "\ufeff", "\ufffd", "\uffff",
    "0", "7", "12", "345", "6789", "1,000.5", "-3e10", "٣٤٥", "१२", "½", "²", "Ⅷ",
    "\u0301", "\u0327", "e\u0301", "A\u030a", "\u0e33", "\u093f", "\u200d", "\u200c", "\ufe0f",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "🧑🏿‍🚀", "\U0001f3fb", "שלום", "مرحبا", "\u200f",
    "\u202e", "\u2067",
    "the", "The", " the", "ing", "ation", "def f(x):", "return", "http://a.b/c",
    "CamelCase", "ÄÖ",
    "straße", "İı", "ﬁ", "漢字", "こんにちは", "カタカナ", "안녕", "ไทย", "Ελληνικά",
    "кириллица", "𝕳𝖊",
    ".", ",", "...", "?!", "()", "{}", "->", "::", "//", "=", "===", "_", "\\n", '"',
    "'", "`", "$€",
]  # fmt: skip
PLANES = [(plane << 16, (plane + 1) << 16) for plane in range(17)]
COMMON = [(0, 0x80), (0, 0x250), (0x250, 0x900), (0x900, 0x3000), (0x3000, 0xD800),
          (0x1F300, 0x1FB00)]  # fmt: skip


def texts(n: int, seed: int = 0) -> Iterator[str]:
    """N texts, most of them short, none with half a surrogate pair."""
    rng = random.Random(seed)
    kinds = [_characters, _mixture, _letters, _run]
    for _ in range(n):
        text = "".join(rng.choice(kinds)(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
        yield text[: 3000 if rng.random() < 0.01 else 120]


def _characters(rng: random.Random) -> str:
    """Of one or two blocks of Unicode."""
    low, high = rng.choice(PLANES if rng.random() < 0.4 else COMMON)
    codes = [rng.randrange(low, high) for _ in range(rng.randrange(1, 12))]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def _mixture(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(1, 12)))


def _letters(rng: random.Random) -> str:
    letters = rng.choice(["etaoin shrdlu", "abc ABC 0189 \n\t.,'", "aeiouäöüßéñ ", "01 ", "xX_-"])
    return "".join(rng.choices(letters, k=rng.randrange(1, 40)))


def _run(rng: random.Random) -> str:
    """The same again and again: white space, digits, or a word without an end."""
    times = rng.choice((2, 3, 5, 17, 60)) if rng.random() < 0.98 else 1000
    return rng.choice([" ", "\n", "\t", "0", "=", "a", "ab", "supercali", "漢", "🙂", "\0"]) * times
