"""Trains a small Llama whose rows are whole blocks of 256, which no real weights at hand have.

llama.cpp's Q4_K packs 256 weights of a row at a time, so tests/compare_kinds.py needs such a model
to compare it without padding. It learns, from nothing, the stories that stories15M writes:

    python3 tests/train_wide.py bin/stories15M.bin bin/wide        # an hour on 2 cores
    python3 export.py bin/wide --out bin/wide.bin

leaves a Hugging Face directory, 4.9 million weights, with a SentencePiece vocabulary of 512
pieces made from the same stories, and DIR.txt: stories that it was not trained on.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama import Llama, SamplingParams

TOGETHER, LENGTH = 32, 256  # stories written at once; tokens of each, and of a training text
HELD_OUT = 512  # stories that are not trained on
VOCAB = 512


def write_stories(path: Path, count: int) -> list[str]:
    stories: list[str] = []
    with Llama(path, max_seq_len=LENGTH) as writer:
        for first in tqdm(range(0, count, TOGETHER), "stories", unit_scale=TOGETHER):
            stories += [done.text.strip() for done in writer.generate([""] * TOGETHER, [
                SamplingParams(temperature=1.0, max_tokens=LENGTH - 1, seed=first + i)
                for i in range(TOGETHER)])]  # fmt: skip
    return stories


def make_vocabulary(stories: list[str], out: Path) -> sentencepiece.SentencePieceProcessor:
    text = out / "stories.txt"
    text.write_text("\n".join(stories), "utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(out / "tokenizer"), model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, character_coverage=1.0, split_digits=True, minloglevel=1,
    )  # fmt: skip
    text.unlink()
    (out / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(str(out / "tokenizer.model"))


def cosine(step: int, steps: int) -> float:
    """The learning rate at STEP, of its most: 100 steps up, then down to a fiftieth."""
    down: float = math.cos(step / steps * math.pi / 2) ** 2
    return min(1, (step + 1) / 100) * (0.02 + 0.98 * down)


def train(tokens: torch.Tensor, steps: int, batch: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.1)
    decay = partial(cosine, steps=steps)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    progress = tqdm(range(steps), "training")
    for _ in progress:
        begins = torch.randint(0, len(tokens) - LENGTH, (batch,))
        ids = torch.stack([tokens[b : b + LENGTH] for b in begins.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("writer", type=Path, metavar="STORIES15M.bin")
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--stories", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    stories = write_stories(args.writer, args.stories + HELD_OUT)
    held_out, stories = stories[:HELD_OUT], stories[HELD_OUT:]
    args.out.with_suffix(".txt").write_text("\n\n".join(held_out), "utf-8")
    vocabulary = make_vocabulary(stories, args.out)
    ids = [[1, *vocabulary.Encode(story)] for story in stories]
    tokens = torch.from_numpy(np.concatenate([np.array(one) for one in ids]))
    train(tokens, args.steps, args.batch).save_pretrained(args.out)


if __name__ == "__main__":
    main()
