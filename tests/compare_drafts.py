"""What drafts gain in time, as docs/performance.md has it: a chat model sums up sections of this
project's documents and writes functions of its source again, without drafts, with lookup, and with
a draft model, in turns. The answers are greedy and have to be the same to the last token.

    python3 tests/compare_drafts.py bin/chat-llama.bin --draft-bin bin/chat-llama-q4.bin
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama import Llama, SamplingParams

ROOT = Path(__file__).parent.parent
LINES = range(12, 32)  # of a section or function that is asked about


def sections() -> Iterator[str]:
    """What stands under the headings of the documents, where it is neither short nor long."""
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]):
        for section in path.read_text("utf-8").split("\n## ")[1:]:
            if section.count("\n") in LINES and "|---" not in section and "```" not in section:
                yield f"Summarize this text:\n\n{section.strip()}"


def functions() -> Iterator[str]:
    """Functions of the source."""
    for path in sorted(ROOT.glob("llama/*.py")):
        text = path.read_text("utf-8")
        for node in ast.parse(text).body:
            source = ast.get_source_segment(text, node)
            if isinstance(node, ast.FunctionDef) and source and source.count("\n") in LINES:
                yield f"Write this function again, with its arguments in capitals.\n\n{source}"


@dataclass
class Sum:
    """Of the answers of one task in one way."""

    tokens: int = 0  # but for the first of each answer, which comes with the prompt
    seconds: float = 0.0
    steps: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("bin", type=Path)
    parser.add_argument("--draft-bin", type=Path, help="a smaller model of the same vocabulary")
    parser.add_argument("--activations", type=int, choices=(8, 16))
    parser.add_argument("--tasks", type=int, default=8, help="prompts of each sort")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, at most")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    tasks = {"summing up": [*sections()], "code": [*functions()]}
    params = SamplingParams(temperature=0, max_tokens=args.tokens)
    with ExitStack() as stack:
        same = {"activations": args.activations}
        ways = {"no drafts": Llama(args.bin, **same), "lookup": Llama(args.bin, lookup=8, **same)}
        if args.draft_bin:
            ways["draft model"] = Llama(args.bin, draft=args.draft_bin, **same)
        for llm in ways.values():
            stack.enter_context(llm)
        print("| task | answers | " + " | ".join(f"{way}, tok/s" for way in ways) + " |")
        print("|---" * (2 + len(ways)) + "|")
        for task, found in tasks.items():
            prompts = found[:: max(1, len(found) // args.tasks)][: args.tasks]
            sums = {way: Sum() for way in ways}
            for prompt in tqdm(prompts * args.repeats, task, disable=None):
                answers = set()
                for way, llm in ways.items():
                    before, total = llm.counters.decode_steps, sums[way]
                    answer = llm.chat([{"role": "user", "content": prompt}], params)
                    answers.add(tuple(answer.token_ids))
                    total.tokens += len(answer.token_ids) - 1
                    total.seconds += answer.decode_seconds
                    total.steps += llm.counters.decode_steps - before
                if len(answers) > 1:
                    sys.exit(f"{task}: the answers differ: {prompt}")
            plain = sums["no drafts"]
            cells = [f"{len(prompts)} of {plain.tokens // len(prompts) // args.repeats} tokens"]
            for total in sums.values():
                cells.append(f"{total.tokens / total.seconds:.1f}")
                if total is not plain:
                    cells[-1] += f": {plain.seconds / total.seconds:.2f} times"
                    cells[-1] += f", {total.tokens / total.steps:.1f} a step"
            print("| " + " | ".join([task, *cells]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
