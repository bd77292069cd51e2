"""run.py's work: one prompt streamed to stdout, or a file of prompts completed together.

What a model with another head than a language model's says about the text is printed in its place.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.cli import open_model, params_of, say, show_prompt, speed_line, text_of
from llama.completion import Result, TokenLogprob
from llama.config import Head
from llama.errors import LlamaError
from llama.generate import Llama
from llama.infill import Gap
from llama.request import Prompt, Request
from llama.sampling import SamplingParams, params_from
from llama.tokenizer import NoTokenizer


def complete(args: Namespace) -> int:
    """Does what the flags say; the exit status."""
    params = params_of(args)
    if args.prompts is not None:
        base = Request("", params, args.n, args.best_of, args.echo)
        requests = read_requests(args.prompts, base)
        with open_model(args) as llm, _reward(args) as reward:
            llm.require(Head.LM, "--prompts")
            # a line of one completion has nothing to choose from
            judged = [replace(r, reward=reward) if r.best_of else r for r in requests]
            _many(llm, judged, args)
        return 0
    prompt: Prompt
    if args.prefix is not None:
        prompt = Gap(read_text(args.prefix), read_text(args.suffix), args.infill_order or "psm")
    elif args.ids is not None:
        prompt = parse_ids(args.ids)
    elif args.prompt is not None:
        prompt = text_of(args.prompt)
    else:
        # a pipe's text ends with the newline that ended its last line
        prompt = sys.stdin.read().removesuffix("\n").removesuffix("\r")
    with open_model(args) as llm, _reward(args) as reward:
        if llm.config.head != Head.LM:
            _judge(llm, prompt, args)
        elif args.n is None and args.best_of is None:
            _one(llm, prompt, params, args)
        else:
            _several(llm, prompt, params, args, reward)
    return 0


def _reward(args: Namespace) -> AbstractContextManager[Llama | None]:
    """The reward model that --reward-bin names, on the same device as the other; None: none."""
    if args.reward_bin is None:
        return nullcontext()
    return Llama(
        args.reward_bin, threads=args.threads, device=args.device, kv=args.kv,
        activations=args.activations, isa=args.isa,
    )  # fmt: skip


def _around(llm: Llama, prompt: Prompt, args: Namespace) -> tuple[str, str]:
    """What is printed before a completion and after it; a gap's whole text is printed as it is."""
    if not args.echo:
        return "", "\n"
    return _before(llm, prompt), prompt.suffix if isinstance(prompt, Gap) else "\n"


def _before(llm: Llama, prompt: Prompt) -> str:
    if isinstance(prompt, Gap):
        return prompt.prefix
    return prompt if isinstance(prompt, str) else _text(llm, list(prompt))


def _one(llm: Llama, prompt: Prompt, params: SamplingParams, args: Namespace) -> None:
    scored = args.echo and params.logprobs is not None
    stream = llm.stream(prompt, params, echo=scored)
    if args.show_prompt:
        show_prompt(llm, llm.prompt_ids(prompt))
    out = sys.stdout
    before, after = _around(llm, prompt, args)
    try:
        out.write("" if scored else before)
        out.flush()
        for piece in stream:
            out.write(piece)
            out.flush()
        if isinstance(llm.tokenizer, NoTokenizer) and stream.result is not None:
            out.write(_text(llm, stream.result.token_ids))
    finally:
        out.write(after)
        out.flush()
    if stream.result is not None:
        _say_logprobs(llm, stream.result)
        _say_dropped(llm, stream.result)
    say(speed_line(llm))


def _judge(llm: Llama, text: Prompt, args: Namespace) -> None:
    """A classifier's label and its score, a reward model's score, each token with its label, or
    the embedding as JSON."""
    for flag in ("prefix", "n", "best_of", "logprobs", "echo"):
        if getattr(args, flag) is not None and getattr(args, flag) is not False:
            llm.require(Head.LM, f"--{flag.replace('_', '-')}")
    assert not isinstance(text, Gap)  # that was --prefix
    lines: list[str]
    if llm.config.head == Head.NONE:
        lines = [json.dumps([float(f"{x:.9g}") for x in llm.embed(text)])]
    elif llm.config.head == Head.TOKEN:
        if not isinstance(text, str):
            raise LlamaError("this model labels the tokens of a text: give it in place of --ids")
        lines = [f"{t.piece!r}\t{t.label}\t{t.score:.4f}" for t in llm.tag(text)]
    elif llm.config.head == Head.ANSWER:
        raise LlamaError(
            "this model answers questions about a text: Llama.answer(question, context) in Python"
        )
    elif llm.config.n_labels == 1:
        lines = [f"{llm.score(text):.6g}"]
    else:
        found = llm.classify(text)
        lines = [f"{found.label}\t{found.score:.4f}"]
    if args.show_prompt:
        show_prompt(llm, llm.text_ids(text))
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    say(speed_line(llm))


def _several(
    llm: Llama, prompt: Prompt, params: SamplingParams, args: Namespace, reward: Llama | None
) -> None:
    results = llm.generate(
        prompt, params, n=1 if args.n is None else args.n, best_of=args.best_of, reward=reward,
        echo=args.echo and params.logprobs is not None,
    )  # fmt: skip
    if args.show_prompt:
        show_prompt(llm, llm.prompt_ids(prompt))
    before, after = _around(llm, prompt, args)
    for result in results:
        total = result.cumulative_logprob
        if len(results) > 1 or total is not None or result.reward is not None:
            told = f", logprob {total:.4f}" if total else ""
            told += "" if result.reward is None else f", reward {result.reward:.4f}"
            say(f"completion {result.completion}{told}")
        bare = isinstance(llm.tokenizer, NoTokenizer)
        text = _text(llm, result.token_ids) if bare else result.text
        sys.stdout.write((before if result.prompt_logprobs is None else "") + text + after)
        sys.stdout.flush()
        if params.logprobs is not None:
            _say_logprobs(llm, result)
        _say_dropped(llm, result)
    say(speed_line(llm))


def _say_logprobs(llm: Llama, result: Result) -> None:
    """Each token's logprob on stderr, and behind it the likeliest ones there were; the prompt's
    tokens, all but the first, come first where they were scored."""
    shown = llm.tokenizer.shown
    for token in [*(result.prompt_logprobs or ()), *(result.logprobs or ())]:
        if token is None:
            continue
        top = ", ".join(f"{shown(i)} {p:.4f}" for i, p in token.top.items())
        line = f"{token.logprob:>10.4f}  {shown(token.token_id)}"
        say(f"{line}  of {top}" if top else line)


def _say_dropped(llm: Llama, result: Result) -> None:
    if result.dropped_tokens:
        say(f"(the context of {llm.max_seq_len} tokens was full: {result.dropped_tokens} tokens "
            "were dropped on the way)")  # fmt: skip


def _many(llm: Llama, requests: list[Request], args: Namespace) -> None:
    if args.show_prompt:
        for request in requests:
            show_prompt(llm, llm.prompt_ids(request.prompt))
    done: dict[int, list[Result]] = {}
    following = 0
    for index, results in llm.each_of(requests):
        done[index] = results
        while following in done:
            request = requests[following]
            # the prompt has a field of its own
            echoed = len(_before(llm, request.prompt)) if request.echo else 0
            lines = [_line(llm, result, echoed) for result in done.pop(following)]
            line = _asked(request.prompt) if request.echo else {}
            line |= lines[0] if request.n is None else {"completions": lines}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            following += 1
    say(speed_line(llm))


def _asked(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Gap):
        return {"prefix": prompt.prefix, "suffix": prompt.suffix}
    return {"prompt": prompt}


def _line(llm: Llama, result: Result, echoed: int) -> dict[str, Any]:
    """A completion as JSON; the first ECHOED characters of its text are its prompt's."""
    line: dict[str, Any] = {}
    if isinstance(llm.tokenizer, NoTokenizer):
        line["token_ids"] = result.token_ids
    else:
        line["text"] = result.text[echoed:]
    line |= {
        "finish_reason": result.finish_reason, "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
    }  # fmt: skip
    if result.prompt_logprobs is not None:
        line["prompt_logprobs"] = [_scored(llm, token) for token in result.prompt_logprobs]
    if result.reward is not None:
        line["reward"] = result.reward
    if result.dropped_tokens:
        line["dropped_tokens"] = result.dropped_tokens
    if result.logprobs is not None:
        line["cumulative_logprob"] = result.cumulative_logprob
        line["logprobs"] = [_scored(llm, token) for token in result.logprobs]
    return line if result.seed is None else line | {"seed": result.seed}


def _scored(llm: Llama, token: TokenLogprob | None) -> dict[str, Any] | None:
    if token is None:
        return None
    top = [_logprob(llm, *other) for other in token.top.items()]
    return {**_logprob(llm, token.token_id, token.logprob), "top": top}


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


def read_text(path: Path) -> str:
    """A file's text, every byte of it; "-" is stdin."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise LlamaError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlamaError(f"{path}: byte {error.start} is not UTF-8") from None


def read_requests(path: Path, base: Request) -> list[Request]:
    """The lines of a JSON Lines file ("-" is stdin): BASE and what each changes of it."""
    # one seed for the whole file, as for a list of prompts
    base = replace(base, params=(base.params or SamplingParams()).seeded())
    requests = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        name = f"{path} line {number}"
        try:
            requests.append(_request(json.loads(line), replace(base, name=name)))
        except ValueError as error:
            raise LlamaError(f"{name}: no JSON: {error}") from None
        except LlamaError as error:
            raise LlamaError(f"{name}: {error}") from None
    return requests


def _request(entry: Any, base: Request) -> Request:
    knobs = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
    prompt: Any = knobs.pop("prompt", None)
    gap = {name: knobs.pop(name) for name in ("prefix", "suffix", "order") if name in knobs}
    if prompt is None and "prefix" in gap and "suffix" in gap:
        prompt = Gap(**gap)
    elif gap or not isinstance(prompt, (str, list)):
        raise LlamaError(
            'expected "text", {"prompt": "text", ...} or {"prefix": "text", "suffix": "text", ...}'
        )
    own = {name: knobs.pop(name) for name in ("n", "best_of", "echo") if name in knobs}
    return replace(base, prompt=prompt, params=params_from(knobs, base.params), **own)
