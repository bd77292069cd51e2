"""The engine as a model of EleutherAI's lm-evaluation-harness (package lm-eval):

python3 -m llama.harness --model llama --model_args bin=bin/chat-llama.bin --tasks arc_easy

is the harness's own command with this model registered. How texts become tokens follows its "hf"
model, so that results may be compared: where a context ends and a continuation begins, when the
begin token is added, how a long text is cut into windows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama.cli import default_bin, run, say, upload_shown
from llama.errors import LlamaError
from llama.generate import Llama
from llama.sampling import SamplingParams

NAME = "llama"
MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed")
IDLE = {"do_sample", "num_beams", "use_cache", "pad_token_id"}  # say nothing more to this engine
MODEL_ARGS = ("bin", "threads", "max_length", "activations", "kv", "isa", "gpu_layers",
              "add_bos_token", "prefix_token_id", "max_gen_toks")  # fmt: skip
Pair = tuple[list[int], list[int]]  # context, continuation


class Adapter:
    """The methods that the harness calls; register() makes it a model of the harness. Requests
    are its Instances: all that is looked at is their args."""

    def __init__(
        self, bin: str | None = None, threads: int | None = None, max_length: int | None = None,
        activations: int | None = None, kv: str | None = None, isa: str | None = None,
        gpu_layers: int | None = None, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None, max_gen_toks: int = MAX_NEW_TOKENS,
        device: str | None = None,
        batch_size: object = None, max_batch_size: object = None, **unknown: object,
    ) -> None:  # fmt: skip
        """BIN (None: bin/chat-llama.bin), THREADS, MAX_LENGTH (the context), ACTIVATIONS, KV, ISA
        and GPU_LAYERS as for Llama. ADD_BOS_TOKEN: None, whether the model has a begin token.
        PREFIX_TOKEN_ID: what stands before an empty context; None, the begin token, else the end
        token. The engine chooses how much it computes together: BATCH_SIZE and MAX_BATCH_SIZE are
        the harness's habit. DEVICE is its own as well, "cuda:0" where nobody says; a library
        without CUDA computes on the CPU, if no GPU_LAYERS are asked for."""
        super().__init__()
        for name in unknown:
            raise LlamaError(f"model_args: there is no {name}; expected {', '.join(MODEL_ARGS)}")
        path = bin or default_bin()

        def opened(device: str) -> Llama:
            with upload_shown() as progress:
                return Llama(
                    path, threads=threads, max_seq_len=max_length, activations=activations, kv=kv,
                    isa=isa, device=device, gpu_layers=gpu_layers, progress=progress,
                )  # fmt: skip

        if device is not None and device.startswith("cuda"):
            try:
                self.llm = opened("cuda")
            except LlamaError as error:
                if gpu_layers is not None:
                    raise
                self.llm = opened("cpu")
                say(f"note: computing on the CPU: {error}")
        else:
            self.llm = opened(device or "cpu")
        config, tokenizer = self.llm.config, self.llm.tokenizer
        self.add_bos_token = config.bos_id is not None if add_bos_token is None else add_bos_token
        if self.add_bos_token and config.bos_id is None:
            raise LlamaError("add_bos_token: this model has no begin token")
        ends = [prefix_token_id, config.bos_id, self.eot_token_id]
        if ends == [None] * 3:
            raise LlamaError("prefix_token_id must be given: this model has no begin or end token")
        self.prefix_token_id = tokenizer.check(next(token for token in ends if token is not None))
        self.max_gen_toks = max_gen_toks
        self.max_length = self.llm.max_seq_len

    @property
    def eot_token_id(self) -> int | None:
        return next(iter(self.llm.config.eos_ids), None)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches of requests apart by."""
        return str(self.llm.meta.get("general.name", self.llm.tokenizer.kind)).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """As the harness notes it in its results; "" where none is asked for."""
        if not chat_template:
            return ""
        return str(self.llm.meta.get("template.jinja", self.llm.template.family))

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The dialog as the model's template writes it; without ADD_GENERATION_PROMPT it ends in
        its last message, for the model to continue."""
        text = self.llm.template.text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    # --- words to tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Control tokens written in STRING are control tokens, and the begin token comes first
        unless it stands there already or ADD_SPECIAL_TOKENS is false."""
        bos = self.llm.config.bos_id
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and bos is not None:
            add = add and not string.startswith(self.llm.tokenizer.piece(bos))
        return self.llm.tokenizer.encode(string, bos=add, parse_special=True)

    def pair(self, context: str, continuation: str) -> Pair:
        """The tokens of both together, cut where the context's own tokens end; spaces that end
        the context belong to the continuation. Behind an empty context, the prefix token."""
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                return ids[:1], ids[1:]
            return [self.prefix_token_id], ids
        before = self.tok_encode(context.rstrip())
        rest = self.tok_encode(context + continuation)[len(before) :]
        return before or [self.prefix_token_id], rest

    def windows(self, string: str) -> Iterator[Pair]:
        """A long text, each token in one continuation: windows of a full context, the first one
        behind the prefix token; the last one reaches back for as much context as fits."""
        ids = [self.prefix_token_id, *self.tok_encode(string)]
        size, done = self.max_length, 1
        while done < len(ids):
            end = min(done + size, len(ids))
            first = max(0, end - size - 1)
            yield ids[first:done], ids[done:end]
            done = end

    # --- what the harness asks

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of args (context, continuation): the continuation's log-probability, and whether greedy
        decoding would say it. A context that is too long loses its beginning."""
        pairs = []
        for number, request in enumerate(requests):
            context, continuation = self.pair(*request.args)
            if not 0 < len(continuation) <= self.max_length:
                raise LlamaError(
                    f"request {number}: the continuation has {len(continuation)} tokens, expected 1"
                    f" to {self.max_length} (the context)"
                )
            room = self.max_length + 1 - len(continuation)
            pairs.append((context[-room:], continuation))
        return self._likelihoods(pairs, "loglikelihood", disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of args (text,): the log-probability of all its tokens."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            found = list(self.windows(*request.args))
            counts.append(len(found))
            pairs += found
        rest = iter(self._likelihoods(pairs, "loglikelihood_rolling", disable_tqdm))
        return [sum(next(rest)[0] for _ in range(count)) for count in counts]

    def _likelihoods(
        self, pairs: Sequence[Pair], what: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        found = dict(_progress(self.llm.likelihoods(pairs), len(pairs), what, disable_tqdm))
        return [tuple(found[number]) for number in range(len(pairs))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of args (context, options): the text up to the first of options["until"], greedy unless
        options say otherwise. A context that leaves too little room loses its beginning."""
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            params.append(self.params(options))
            limit = params[-1].max_tokens or self.max_gen_toks
            if limit >= self.max_length:
                raise LlamaError(
                    f"max_gen_toks is {limit}, expected less than the context of {self.max_length}"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(ids[limit - self.max_length :])
        done = self.llm.each(prompts, params)
        found = dict(_progress(done, len(prompts), "generate_until", disable_tqdm))
        return [self._text(found[number].token_ids, one) for number, one in enumerate(params)]

    def _text(self, ids: Sequence[int], params: SamplingParams) -> str:
        """Of the completion by itself, as the harness decodes it: without the space before its
        first word where a text's first word has none."""
        text = self.llm.tokenizer.decode(ids)
        for stop in params.stop:
            text = text.split(stop)[0]
        return text

    def params(self, options: Mapping[str, Any]) -> SamplingParams:
        """The harness's generation options as ours; one that is not known is refused."""
        left = {name: value for name, value in options.items() if value is not None}
        until = left.pop("until", ())
        stop = [until] if isinstance(until, str) else list(until)
        limits = [left.pop(name) for name in LIMITS if name in left]
        greedy = not left.get("do_sample", left.get("temperature", 0) > 0)
        knobs: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}  # transformers' defaults
        knobs |= {name: left.pop(name) for name in SAMPLING if name in left}
        if greedy:
            knobs["temperature"] = 0.0
        if unknown := sorted(left.keys() - IDLE):
            raise LlamaError(f"generation option {unknown[0]!r} is not known to this engine")
        return SamplingParams(
            **knobs, max_tokens=int(limits[0] if limits else self.max_gen_toks),
            stop=tuple(one for one in stop if one),
        )  # fmt: skip


def _progress(
    found: Iterable[tuple[int, Any]], total: int, what: str, disable: bool
) -> Iterator[tuple[int, Any]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, disable=disable or None) as bar:
        for one in found:
            yield one
            bar.update()


def register(name: str = NAME) -> type:
    """Adds the model NAME to the harness's, and returns its class."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise LlamaError(f"the harness is missing ({error}): pip install lm-eval") from None
    made: type = register_model(name)(type("LlamaLM", (Adapter, LM), {"__doc__": Adapter.__doc__}))
    return made


def main() -> int:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(run("llama.harness", main))
