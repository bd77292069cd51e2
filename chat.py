#!/usr/bin/env python3
"""Talks with a chat model: a line is a message; /help lists the commands."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    from llama import cli

    parser = cli.Parser(prog="chat.py", description=__doc__)
    parser.add_argument(
        "--system", metavar="TEXT", help="what the model is told first (default: its family's own)"
    )
    parser.add_argument(
        "--template", metavar="FAMILY", help="chat template, where the model file names none"
    )
    parser.add_argument(
        "--date", metavar="DATE",
        help='the day that Llama 3.1 and later are told, "26 Jul 2024" (default: as the model\'s '
        "template has it; from Meta's own files, which have none, no date)",
    )  # fmt: skip
    parser.add_argument(
        "--session", type=Path, metavar="FILE",
        help="go on with the conversation in FILE, with the model that began it, and keep it "
        "there; a new FILE begins one",
    )  # fmt: skip
    cli.add_sampling_flags(parser, max_tokens=1024)
    cli.add_model_flags(parser)
    cli.add_speculation_flags(parser)
    cli.add_overflow_flags(
        parser, None, "slide, by whole turns; if the model cannot, turns go between answers only"
    )
    args = parser.parse_args()

    def work() -> int:
        from llama.talk import talk

        return talk(args)

    return cli.run("chat.py", work)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
