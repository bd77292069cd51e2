"""One completion under way: its tokens, the text they have become so far, and why it ended.

Text leaves a Job only when it is certain: whole characters, and nothing that could still turn
out to be the beginning of a stop string.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llama.errors import LlamaError
from llama.overflow import Window
from llama.sampling import SamplingParams
from llama.tokenizer import NoTokenizer, StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from llama.batch import Slot

FinishReason = Literal["length", "stop", "eos", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself found a token, before temperature and every other knob."""

    token_id: int
    logprob: float  # natural logarithm, as in OpenAI's answers and transformers' log_softmax
    top: dict[int, float]  # the likeliest tokens' ids and logprobs, likeliest first


@dataclass(frozen=True)
class Result:
    """A finished completion."""

    text: str  # without control tokens and without the stop string; with echo behind the prompt
    token_ids: list[int]  # as sampled, the end token included
    # "length": max_tokens, or the context's end where overflow is "stop"; "stop": a stop string;
    # "eos": the model ended; "cancelled": Stream.cancel()
    finish_reason: FinishReason
    prompt_tokens: int  # as computed: what "slide" drops of a prompt too long is not among them
    cached_tokens: int  # of the prompt, taken from earlier work and not computed again
    prompt_seconds: float  # until the first token
    decode_seconds: float  # from the first token to the last
    seed: int | None  # the same seed gives the same text; None where greedy draws nothing
    # of each of token_ids, where params ask for them or best_of needs them
    logprobs: list[TokenLogprob] | None = None
    dropped_tokens: int = 0  # of prompt and completion, where overflow is "slide"
    completion: int = 0  # its number among those of one prompt; it keys the random numbers
    reward: float | None = None  # what a reward model gives it, where one was asked
    # of each token of the prompt, given those before it, with echo and logprobs; the first is None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the tokens' logprobs: the completion's own, given the prompt."""
        return None if self.logprobs is None else sum(token.logprob for token in self.logprobs)


class StopStrings:
    """Lets text through up to the first stop string, holding back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def feed(self, text: str, last: bool = False) -> str:
        if self.hit:
            return ""
        text = self._held + text
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self.hit, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Job:
    """A prompt's ids (n_prompt) and the completion that grows behind them in the same list."""

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer,
        stop_ids: Collection[int], window: Window, fresh: bool, echo: str = "",
        scored: bool = False,
    ) -> None:  # fmt: skip
        """FRESH: the completion begins a text, so its first word loses its space; else it
        continues the prompt's. ECHO stands before its text. SCORED: the prompt's tokens have
        logprobs too."""
        self._world = (tokenizer, stop_ids, fresh, echo, scored)
        self._prompt, self.window = prompt, window
        if not prompt:
            raise LlamaError("the prompt is empty and this model has no begin token")
        if params.stop and isinstance(tokenizer, NoTokenizer):
            raise LlamaError("stop strings need a tokenizer and this model file holds none")
        if (params.logprobs or 0) > tokenizer.vocab_size:
            raise LlamaError(
                f"logprobs must be 0 to {tokenizer.vocab_size} (the vocabulary), found "
                f"{params.logprobs}"
            )
        self.ids = window.fit([tokenizer.check(token) for token in prompt])
        self.n_prompt = len(self.ids)
        self.params = params.seeded()
        self.completion = 0  # the number that keys the random numbers
        self.leader: Job | None = None  # the first of those that share this prompt
        self.slot: Slot | None = None
        self.cancelled = False
        self.text = ""
        self.result: Result | None = None
        self._echo = echo
        self._scored = scored
        self.scores_prompt = scored  # it is this job that finds them
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._limit = window.limit(self.n_prompt, params.max_tokens)
        if scored and len(prompt) >= window.overflow.size:
            raise LlamaError(
                f"the prompt has {len(prompt)} tokens and fills the context; its logprobs need "
                "room for one more"
            )
        self._stop_ids = stop_ids
        self._decoder = StreamDecoder(tokenizer, fresh)
        self._stops = StopStrings(params.stop)
        for token, _ in params.biases:
            if token >= tokenizer.vocab_size:
                raise LlamaError(
                    f"logit_bias token id must be 0 to {tokenizer.vocab_size - 1}, found {token}"
                )
        self._seen = list(set(self.ids)) if params.repetition_penalty != 1 else []
        self._logprobs: list[TokenLogprob] = []
        self.mu = array("d", [2 * params.mirostat_tau])
        self._cached = 0
        self._began = self._first = self._last = 0.0

    def twin(self, completion: int) -> Job:
        """Another completion of the same prompt; for one that has not begun."""
        tokenizer, stop_ids, fresh, echo, scored = self._world
        twin = Job(
            self._prompt, self.params, tokenizer, stop_ids, self.window.twin(), fresh, echo, scored
        )  # fmt: skip
        twin.completion, twin.leader = completion, self
        twin.scores_prompt = False
        twin._prompt_logprobs = self._prompt_logprobs
        return twin

    def start(self, cached: int) -> None:
        """The prompt's computation begins; its first CACHED tokens are known."""
        self._cached = cached
        self._began = self._first = self._last = time.perf_counter()

    def left(self) -> int:
        """How many tokens may still come; many, where nothing says."""
        limit = 2**31 if self._limit is None else self._limit
        return limit - (len(self.ids) - self.n_prompt)

    def full(self) -> bool:
        """Whether no token may come any more."""
        return self.left() <= 0

    def computed(self) -> int:
        """How many of ids went through the network; some of them may have left the context."""
        assert self.slot is not None
        return len(self.slot.tokens) + self.window.slid

    def seen(self) -> list[int]:
        """What the penalties look at: the prompt's tokens, for repetition_penalty alone, then the
        said() ones; empty where they are off."""
        return self._seen

    def said(self) -> int:
        """How many of seen() are the completion's own."""
        return len(self.ids) - self.n_prompt if self._seen else 0

    def kept(self) -> list[int]:
        """The prompt's ids and the completion's, without the last ones if nothing but a stop
        string, which is no part of the text, came of them."""
        if not self._stops.hit:
            return self.ids
        tokenizer, _, fresh, echo, _ = self._world
        decoder = StreamDecoder(tokenizer, fresh)
        left, n = len(self.text) - len(echo), self.n_prompt
        while left > 0 and n < len(self.ids):
            left -= len(decoder.feed(self.ids[n]))
            n += 1
        return self.ids[:n]

    def note(self, token: int, logprob: float, top: dict[int, float]) -> None:
        """The logprobs of the token that push() takes next."""
        self._logprobs.append(TokenLogprob(token, logprob, top))

    def score(self, token: int, logprob: float, top: dict[int, float]) -> None:
        """The logprobs of the prompt's next token."""
        self._prompt_logprobs.append(TokenLogprob(token, logprob, top))

    def push(self, token: int) -> str:
        """Takes the next sampled token; returns the text that is now certain."""
        self._last = time.perf_counter()
        if len(self.ids) == self.n_prompt:
            self._first = self._last
        self.ids.append(token)
        if self.params.looks_back:
            self._seen.append(token)
        if token in self._stop_ids:
            return self.end("eos")
        text = self._certain(self._decoder.feed(token))
        if self._stops.hit:
            return text + self.end("stop")
        return text + self.end("length") if self.full() else text

    def end(self, reason: FinishReason) -> str:
        """Ends the completion; returns the text that was held back."""
        if reason == "length" and len(self.ids) - self.n_prompt != self.params.max_tokens:
            self.window.refuse_end()
        text = self._certain(self._decoder.finish(), last=True)
        self.result = Result(
            text=self.text, token_ids=self.ids[self.n_prompt :],
            finish_reason="stop" if self._stops.hit else reason,
            prompt_tokens=self.n_prompt, cached_tokens=self._cached,
            prompt_seconds=self._first - self._began, decode_seconds=self._last - self._first,
            seed=self.params.seed if self.params.temperature else None,
            logprobs=None if self.params.logprobs is None else self._logprobs,
            dropped_tokens=self.window.dropped, completion=self.completion,
            prompt_logprobs=self._prompt_logprobs if self._scored else None,
        )  # fmt: skip
        return text

    def _certain(self, text: str, last: bool = False) -> str:
        """What of TEXT can be let go, behind the echo; it is part of the job's text now."""
        text = self._echo + self._stops.feed(text, last)
        self._echo = ""
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of STOP, not all of it, that TEXT ends with."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
