#!/usr/bin/env python3
"""Completes a prompt, given as an argument or on standard input; stdout carries only the text."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    from llama import cli

    parser = cli.Parser(prog="run.py", description=__doc__)
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text to complete (default: stdin's)"
    )
    parser.add_argument(
        "--echo", action="store_true", help="print the prompt before its completion"
    )
    parser.add_argument("--ids", metavar="N,N,...", help="token ids in place of a text")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl",
        help='complete many together: a line is "text" or {"prompt": "text", "max_tokens": 8, ...} '
        "and gives a line of JSON, in order; - is stdin",
    )  # fmt: skip
    parser.add_argument(
        "--n", type=int, metavar="N",
        help="so many completions, each ended by a newline; the prompt is read once",
    )  # fmt: skip
    parser.add_argument(
        "--best-of", type=int, metavar="N",
        help="make so many and print the --n (1) with the largest sum of logprobs, best first",
    )  # fmt: skip
    parser.add_argument(
        "--logprobs", type=int, metavar="N",
        help="each token's logprob and those of the N likeliest: on stderr, or with --prompts in "
        "the lines",
    )  # fmt: skip
    cli.add_sampling_flags(parser, max_tokens=256)
    cli.add_model_flags(parser)
    cli.add_overflow_flags(parser, "stop", "stop")
    args = parser.parse_args()
    if sum(given is not None for given in (args.prompt, args.ids, args.prompts)) > 1:
        parser.error("give one of PROMPT, --ids and --prompts")
    if args.prompt is None and args.ids is None and args.prompts is None and at_keyboard():
        parser.error('give a prompt: run.py "Once upon a time", or one on standard input')

    def work() -> int:
        from llama.complete import complete

        return complete(args)

    return cli.run("run.py", work)


def at_keyboard() -> bool:
    return sys.stdin is None or sys.stdin.isatty()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
