#!/usr/bin/env python3
"""Turns a checkpoint (Meta, Hugging Face, GGUF, llama2.c) into bin/NAME.bin."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    from llama import cli

    parser = cli.Parser(prog="export.py", description=__doc__)
    parser.add_argument(
        "source", nargs="?", type=Path, metavar="SOURCE",
        help="the checkpoint: a directory, a .gguf, llama2.c's .bin (default: the one in bin/; "
        "if there is none, SmolLM2-135M-Instruct is downloaded)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=cli.DEFAULT_BIN, metavar="FILE",
        help="what to write (default: bin/chat-llama.bin)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["f32", "f16", "bf16"],
        help="how to store weights (default: the source's own; f16 for a quantised one)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH",
        help="a tokenizer's file (default: the one in the checkpoint or beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--template", metavar="NAME",
        help="chat template's family, or none (default: found in the checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N",
        help="the context, in tokens (default: what the model was trained for, found or inferred)",
    )  # fmt: skip
    parser.add_argument(
        "--rope-scaling", metavar="KIND",
        help="how positions are scaled, in place of what the checkpoint says: none, "
        "linear:FACTOR, dynamic:FACTOR[,ORIGINAL], yarn:FACTOR[,ORIGINAL] or "
        "llama3:FACTOR[,LOW,HIGH[,ORIGINAL]]; ORIGINAL is the context before scaling (default: the "
        "model's own; llama3's 1,4,8192)",
    )  # fmt: skip
    parser.add_argument(
        "--infill", choices=["yes", "no"],
        help="whether the model was trained to infill (default: inferred from its vocabulary, "
        "name and shape)",
    )  # fmt: skip
    parser.add_argument(
        "--lora", type=Path, action="append", default=[], metavar="DIR",
        help="a PEFT adapter's directory, merged into the weights; several are merged in order",
    )  # fmt: skip
    args = parser.parse_args()

    def work() -> int:
        from llama import checkpoints
        from llama.checkpoints import default

        infill = None if args.infill is None else args.infill == "yes"
        options = checkpoints.Options(
            args.tokenizer, args.template, args.max_seq_len, args.rope_scaling, infill,
            tuple(args.lora),
        )
        source = args.source or checkpoints.find(cli.DEFAULT_BIN.parent)
        if source is None:
            default.export_default(args.out, dtype=args.dtype, force=args.force, options=options)
        else:
            checkpoints.export(
                source, args.out, dtype=args.dtype, force=args.force, options=options
            )
        return 0

    return cli.run("export.py", work, interrupted="interrupted, nothing was written")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
