#!/usr/bin/env python3
"""Completes a prompt, given as an argument or on standard input; stdout carries only the text.

Of a model that judges texts it prints what it says about the prompt: a classifier's label and
score, a reward, each token's label, or the embedding as JSON.
"""

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
        "--echo", action="store_true",
        help="print the prompt with its completion, and score its tokens with --logprobs",
    )  # fmt: skip
    parser.add_argument("--ids", metavar="N,N,...", help="token ids in place of a text")
    parser.add_argument(
        "--prefix", type=Path, metavar="FILE",
        help="fill the gap between this text and --suffix's, if the model can; - is stdin",
    )  # fmt: skip
    parser.add_argument("--suffix", type=Path, metavar="FILE", help="what stands behind the gap")
    parser.add_argument(
        "--infill-order", choices=["psm", "spm"],
        help="which of the two the model reads first: prefix (psm, default) or suffix (spm)",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl",
        help='complete many together: a line is "text", {"prompt": "text", "max_tokens": 8, '
        '"n": 2, ...} or {"prefix": "text", "suffix": "text", ...} and gives a line of JSON, in '
        "order; - is stdin",
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
        "--reward-bin", type=Path, metavar="FILE",
        help="a reward model of the same vocabulary, whose score counts for --best-of instead",
    )  # fmt: skip
    parser.add_argument(
        "--logprobs", type=int, metavar="N",
        help="each token's logprob and those of the N likeliest: on stderr, or with --prompts in "
        "the lines",
    )  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--selftest", action="store_true",
        help="complete nothing: check the file's checksums, and that each kernel set and device "
        "here computes what the file says of itself; looks at --bin and --threads alone",
    )  # fmt: skip
    instead.add_argument(
        "--verify", action="store_true",
        help="complete nothing: read the file at --bin whole and compare each tensor's checksum",
    )  # fmt: skip
    instead.add_argument(
        "--info", action="store_true",
        help="complete nothing: print what the file at --bin is, and the "
        "memory that it takes with --max-seq-len and --kv",
    )  # fmt: skip
    cli.add_sampling_flags(parser, max_tokens=256)
    cli.add_model_flags(parser)
    cli.add_speculation_flags(parser)
    cli.add_overflow_flags(parser, "stop", "stop")
    args = parser.parse_args()
    if (args.prefix is None) != (args.suffix is None):
        parser.error("give both --prefix and --suffix")
    if args.prefix is not None and str(args.prefix) == str(args.suffix) == "-":
        parser.error("only one of --prefix and --suffix can be stdin")
    if args.infill_order is not None and args.prefix is None:
        parser.error("--infill-order needs --prefix and --suffix")
    prompts = (args.prompt, args.ids, args.prompts, args.prefix)
    given = sum(prompt is not None for prompt in prompts)
    if given > 1:
        parser.error("give one of PROMPT, --ids, --prompts and --prefix")
    if args.keep is not None and args.overflow != "slide":
        parser.error("--keep needs --overflow slide")
    if args.reward_bin is not None and args.best_of is None:
        parser.error("--reward-bin needs --best-of, how many completions it chooses from")
    instead_of = ("selftest", "verify", "info")
    no_prompt = next((f"--{name}" for name in instead_of if getattr(args, name)), None)
    if no_prompt and given:
        parser.error(f"{no_prompt} takes no prompt")
    if not (no_prompt or given) and at_keyboard():
        parser.error('give a prompt: run.py "Once upon a time", or one on standard input')

    def work() -> int:
        if args.info:
            from llama.info import show

            return show(args.bin or cli.default_bin(), args.max_seq_len, args.kv)
        if args.selftest:
            from llama.selftest import selftest

            return 0 if selftest(args.bin or cli.default_bin(), args.threads) else 1
        if args.verify:
            from llama.selftest import verify

            return 0 if verify(args.bin or cli.default_bin()) else 1
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
