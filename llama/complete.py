"""run.py's work: one prompt streamed to stdout, or a file of prompts completed together."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from llama.cli import open_model, params_of, say, show_prompt, speed_line, text_of
from llama.completion import Result
from llama.errors import LlamaError
from llama.generate import Llama, Prompt
from llama.sampling import SamplingParams, params_from
from llama.tokenizer import NoTokenizer


def complete(args: Namespace) -> int:
    """Does what the flags say; the exit status."""
    params = params_of(args)
    if args.prompts is not None:
        prompts, each = read_prompts(args.prompts, params)
        with open_model(args) as llm:
            _many(llm, prompts, each, args)
        return 0
    prompt: Prompt
    if args.ids is not None:
        prompt = parse_ids(args.ids)
    elif args.prompt is not None:
        prompt = text_of(args.prompt)
    else:
        # a pipe's text ends with the newline that ended its last line
        prompt = sys.stdin.read().removesuffix("\n").removesuffix("\r")
    with open_model(args) as llm:
        if args.n is None and args.best_of is None:
            _one(llm, prompt, params, args)
        else:
            _several(llm, prompt, params, args)
    return 0


def _one(llm: Llama, prompt: Prompt, params: SamplingParams, args: Namespace) -> None:
    stream = llm.stream(prompt, params)
    if args.show_prompt:
        show_prompt(llm, llm.prompt_ids(prompt))
    out = sys.stdout
    try:
        if args.echo:
            out.write(prompt if isinstance(prompt, str) else _text(llm, list(prompt)))
            out.flush()
        for piece in stream:
            out.write(piece)
            out.flush()
        if isinstance(llm.tokenizer, NoTokenizer) and stream.result is not None:
            out.write(_text(llm, stream.result.token_ids))
    finally:
        out.write("\n")
        out.flush()
    if stream.result is not None:
        _say_logprobs(llm, stream.result)
        _say_dropped(llm, stream.result)
    say(speed_line(llm))


def _several(llm: Llama, prompt: Prompt, params: SamplingParams, args: Namespace) -> None:
    results = llm.generate(prompt, params, n=args.n or 1, best_of=args.best_of)
    if args.show_prompt:
        show_prompt(llm, llm.prompt_ids(prompt))
    for result in results:
        total = result.cumulative_logprob
        if len(results) > 1 or total is not None:
            say(f"completion {result.completion}" + (f", logprob {total:.4f}" if total else ""))
        if args.echo:
            sys.stdout.write(prompt if isinstance(prompt, str) else _text(llm, list(prompt)))
        bare = isinstance(llm.tokenizer, NoTokenizer)
        sys.stdout.write((_text(llm, result.token_ids) if bare else result.text) + "\n")
        sys.stdout.flush()
        if params.logprobs is not None:
            _say_logprobs(llm, result)
        _say_dropped(llm, result)
    say(speed_line(llm))


def _say_logprobs(llm: Llama, result: Result) -> None:
    """Each token's logprob on stderr, and behind it the likeliest ones there were."""
    for token in result.logprobs or ():
        top = ", ".join(f"{llm.tokenizer.piece(i)!r} {p:.4f}" for i, p in token.top.items())
        line = f"{token.logprob:>10.4f}  {llm.tokenizer.piece(token.token_id)!r}"
        say(f"{line}  of {top}" if top else line)


def _say_dropped(llm: Llama, result: Result) -> None:
    if result.dropped_tokens:
        say(f"(the context of {llm.max_seq_len} tokens was full: {result.dropped_tokens} tokens "
            "were dropped on the way)")  # fmt: skip


def _many(llm: Llama, prompts: list[Prompt], each: list[SamplingParams], args: Namespace) -> None:
    if args.show_prompt:
        for prompt in prompts:
            show_prompt(llm, llm.prompt_ids(prompt))
    done: dict[int, list[Result]] = {}
    following = 0
    for index, results in llm.each(prompts, each, n=args.n or 1, best_of=args.best_of):
        done[index] = results
        while following in done:
            line: dict[str, Any] = {"prompt": prompts[following]} if args.echo else {}
            lines = [_line(llm, result) for result in done.pop(following)]
            line |= lines[0] if args.n is None else {"completions": lines}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            following += 1
    say(speed_line(llm))


def _line(llm: Llama, result: Result) -> dict[str, Any]:
    line: dict[str, Any] = {}
    if isinstance(llm.tokenizer, NoTokenizer):
        line["token_ids"] = result.token_ids
    else:
        line["text"] = result.text
    line |= {
        "finish_reason": result.finish_reason, "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
    }  # fmt: skip
    if result.dropped_tokens:
        line["dropped_tokens"] = result.dropped_tokens
    if result.logprobs is not None:
        line["cumulative_logprob"] = result.cumulative_logprob
        line["logprobs"] = [
            {**_logprob(llm, token.token_id, token.logprob),
             "top": [_logprob(llm, *other) for other in token.top.items()]}
            for token in result.logprobs
        ]  # fmt: skip
    return line if result.seed is None else line | {"seed": result.seed}


def _logprob(llm: Llama, token: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token, "token": llm.tokenizer.piece(token), "logprob": logprob}


def _text(llm: Llama, ids: list[int]) -> str:
    if isinstance(llm.tokenizer, NoTokenizer):
        return " ".join(map(str, ids)) + " "
    return llm.tokenizer.decode(ids)


def parse_ids(text: str) -> list[int]:
    """Token ids, separated by commas or spaces."""
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids:
        raise LlamaError(f"--ids must be whole numbers, found {text!r}")
    return ids


def read_prompts(path: Path, params: SamplingParams) -> tuple[list[Prompt], list[SamplingParams]]:
    """The prompts of a JSON Lines file ("-" is stdin) and their parameters: PARAMS and what a
    line changes."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = data.decode("utf-8").split("\n")
    except OSError as error:
        raise LlamaError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlamaError(f"{path}: byte {error.start} is not UTF-8") from None
    params = params.seeded()  # one seed for the whole file, as for a list of prompts
    prompts: list[Prompt] = []
    each: list[SamplingParams] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            knobs = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
            prompt = knobs.pop("prompt", None)
            if not isinstance(prompt, (str, list)):
                raise LlamaError('expected "text" or {"prompt": "text", ...}')
            each.append(params_from(knobs, params))
            prompts.append(prompt)
        except ValueError as error:
            raise LlamaError(f"{path} line {number}: no JSON: {error}") from None
        except LlamaError as error:
            raise LlamaError(f"{path} line {number}: {error}") from None
    return prompts, each
