"""Who says what may come next, so that one forward pass can check several tokens at once.

Speculative decoding (arXiv:2211.17192, arXiv:2302.01318) by equality: batch.py computes drafted
tokens as further rows of its pass and samples each row with that position's own random number; a
draft is kept while it is what was sampled. So drafts decide how fast a text comes and never what
it says. Lookup finds them in the text itself, Draft asks a smaller model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from llama.batch import common_prefix
from llama.config import Head
from llama.errors import LlamaError
from llama.reward import vocabularies_differ
from llama.sampling import whole_number

if TYPE_CHECKING:
    from llama.batch import Batches, Slot
    from llama.completion import Job
    from llama.facts import Config
    from llama.tokenizer import Tokenizer

MOST = 8  # tokens drafted at once, unless told otherwise,
LIMIT = 64  # and however told
ROW = 0.15  # what one more row costs of a decoding step: measured, a prompt's token takes so much
RATE = 1 / 8  # how much the latest outcome weighs
SHORTEST, LONGEST = 2, 8  # tokens that two places of a text must share, and that are compared
PLACES = 32  # of them looked at
REST = 8  # tokens for which a draft model that does not pay is left alone at first,
MAX_REST = 256  # and at most
TOGETHER = 16  # tokens that the draft model reads in the pass that guesses; others before, so that
# completions of one prompt read it once


class Proposer(Protocol):
    """Drafts for completions under way. What it proposes is checked, and may be anything."""

    name: str
    bytes_read: int  # of weights and caches of its own, so far

    def propose(self, asked: Sequence[tuple[Job, int]]) -> list[list[int]]:
        """What may follow the ids of each job: at most so many tokens, none where it would not
        pay. Jobs whose texts run together are asked for together."""
        ...

    def release(self, job: Job) -> None:
        """JOB has ended; it may never have been asked for."""
        ...


class Pace:
    """How likely a drafted token is to be right, by what happened lately."""

    def __init__(self, chance: float) -> None:
        self.chance = chance

    def learn(self, guess: Sequence[int], came: Sequence[int]) -> None:
        """GUESS was to follow where CAME did."""
        right = common_prefix(guess, came, len(guess))
        for _ in range(right):
            self.chance += RATE * (1 - self.chance)
        if right < min(len(guess), len(came)):
            self.chance -= RATE * self.chance

    def length(self, worth: float, most: int) -> int:
        """How many tokens, at most MOST, are right with a probability of WORTH or more."""
        n, chance = 0, self.chance
        while n < most and chance >= worth:
            n, chance = n + 1, chance * self.chance
        return n


def worth(n_texts: int, draft: float = 0.0) -> float:
    """The probability from which a drafted token pays in a step of N_TEXTS: what its row costs,
    and DRAFT, its making, against what a token costs without it; both in steps of one row."""
    return (ROW * n_texts + draft) / (1 + ROW * n_texts)


def proposer(
    batches: Batches, tokenizer: Tokenizer, lookup: int, draft: tuple[Batches, Tokenizer] | None
) -> Proposer | None:
    """What drafts for the model of BATCHES and TOKENIZER: LOOKUP tokens at once from its text (0:
    none), or the model of DRAFT; LlamaError where the two do not belong together."""
    lookup = whole_number("lookup", lookup, 0, LIMIT)
    if draft is None:
        return Lookup(lookup) if lookup else None
    if lookup:
        raise LlamaError("lookup and draft both say what may come next: give one of them")
    small, other = draft
    small.check_open()
    ours, theirs = batches.engine, small.engine
    names = f"{theirs.model.path} cannot draft for {ours.model.path}"
    if not theirs.config.head == ours.config.head == Head.LM:
        raise LlamaError(f"{names}: both must be language models")
    problem = vocabularies_differ(tokenizer, other)
    sizes = ours.config.vocab_size, theirs.config.vocab_size
    if problem is None and sizes[0] != sizes[1]:  # embeddings padded to different sizes
        problem = f"expected {sizes[0]} logits, found {sizes[1]}"
    if problem is not None:
        raise LlamaError(f"{names}, it has another vocabulary: {problem}")
    return Draft(small, ours.config)


# --- the text itself


class Repeats:
    """A growing text and where its latest tokens stood before: chains of places with the same
    last tokens, the latest first, as compressors of the LZ77 family keep them."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # the place behind its latest occurrence
        self._before = array("q", [-1] * SHORTEST)  # of each place, the one before it in its chain
        self._guess: list[int] = []
        self._at = 0  # where the guess was to stand,
        self._shared = 0  # and how many tokens its two places shared
        # longer repetitions are likelier to go on
        self._paces = [Pace(1 - 1 / max(n, 1)) for n in range(LONGEST + 1)]

    def draft(self, ids: Sequence[int], most: int, worth: float) -> list[int]:
        """What stood behind the earlier place that shares most with the end of IDS, which only
        ever grow."""
        self._paces[self._shared].learn(self._guess, ids[self._at :])
        self._add(ids)
        place, self._shared = self._longest(ids)
        self._at, self._guess = len(ids), []
        if self._shared:
            n = self._paces[self._shared].length(worth, most)
            period = len(ids) - place
            for i in range(max(n, 1)):  # one is remembered even if none pays, to learn from
                self._guess.append(ids[place + i] if i < period else self._guess[i - period])
            return self._guess[:n]
        return []

    def _add(self, ids: Sequence[int]) -> None:
        for end in range(len(self._before), len(ids) + 1):
            key = tuple(ids[end - SHORTEST : end])
            self._before.append(self._last.get(key, -1))
            self._last[key] = end

    def _longest(self, ids: Sequence[int]) -> tuple[int, int]:
        """The place that shares most tokens before it with the end of IDS, and how many."""
        found, shared = -1, 0
        place = self._before[len(ids)] if len(ids) >= SHORTEST else -1
        for _ in range(PLACES):
            if place < 0 or shared == LONGEST:
                break
            n = SHORTEST
            while n < min(LONGEST, place) and ids[place - n - 1] == ids[-n - 1]:
                n += 1
            if n > shared:
                found, shared = place, n
            place = self._before[place]
        return found, shared


class Lookup:
    """Prompt lookup: what followed the latest tokens when they stood in the text before, as it
    does where a text quotes, sums up or corrects its prompt (arXiv:2304.04487)."""

    name, bytes_read = "lookup", 0

    def __init__(self, most: int = MOST) -> None:
        """MOST: tokens drafted at once."""
        self._most = most
        self._texts: dict[Job, Repeats] = {}

    def propose(self, asked: Sequence[tuple[Job, int]]) -> list[list[int]]:
        pays = worth(len(asked))
        return [
            self._texts.setdefault(job, Repeats()).draft(job.ids, min(most, self._most), pays)
            for job, most in asked
        ]

    def release(self, job: Job) -> None:
        self._texts.pop(job, None)


# --- a smaller model


class Text:
    """A job's text as the draft model knows it: from `start` on, in a sequence of its own."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.slot: Slot | None = None
        self.start = 0  # of the job's ids
        self.length = 0  # of the beginning that the slot was taken for, see Config.rope_length
        self.guess: list[int] = []
        self.most = 0  # how long the guess is to be
        self.agreed = 0  # the slot holds the beginning of so many of the ids, as far as it goes
        self.mu = array("d", job.mu)  # mirostat's number, which guesses move too
        self._at = 0  # where the guess stands
        self._pace = Pace(0.7)
        self._rest, self._again = REST, 0

    def plan(self, worth: float, most: int) -> None:
        """Learns how the last guess went and how long the next is to be."""
        ids = self.job.ids
        self._pace.learn(self.guess, ids[self._at :])
        self._at, self.guess, self.mu = len(ids), [], array("d", self.job.mu)
        self.most = self._pace.length(worth, most)
        if self.most:
            self._rest = REST
        elif most and len(ids) >= self._again:  # a try now and then, rarer each time
            self.most = 1
            self._again = len(ids) + self._rest
            self._rest = min(2 * self._rest, MAX_REST)

    def missing(self) -> int:
        """How many tokens, guessed ones included, the sequence does not hold yet."""
        assert self.slot is not None
        return len(self.job.ids) - self.start + len(self.guess) - len(self.slot.tokens)

    def following(self, count: int) -> list[int]:
        """The first COUNT of them."""
        assert self.slot is not None
        ids, first = self.job.ids, self.start + len(self.slot.tokens)
        return [*ids[first : first + count], *self.guess[max(0, first - len(ids)) :]][:count]


class Draft:
    """A smaller model of the same vocabulary. It draws with the random numbers of the text
    that it drafts, so that the two models agree as often as their probabilities let them."""

    name = "draft"

    def __init__(self, batches: Batches, target: Config, most: int = MOST) -> None:
        """BATCHES are the small model's, TARGET is the other's shape. MOST: tokens drafted at
        once."""
        own = batches.engine.config
        self._batches = batches
        self._most = min(most, max(1, batches.engine.max_seq_len // 2))
        # a draft of half the size or more hardly ever pays; whoever asks for one shall have it
        self._price = min(0.5, own.step_bytes / target.step_bytes)
        self._texts: dict[Job, Text] = {}
        self.bytes_read = 0

    def propose(self, asked: Sequence[tuple[Job, int]]) -> list[list[int]]:
        texts = []
        pays = worth(len(asked), self._price)
        for job, most in asked:
            text = self._texts.setdefault(job, Text(job))
            text.plan(pays, min(most, self._most))
            texts.append(text)
        try:
            for text in texts:
                if text.most:
                    self._agree(text)
            while writing := [text for text in texts if len(text.guess) < text.most]:
                self._forward([(text, text.following(TOGETHER)) for text in writing])
        except LlamaError as error:
            raise LlamaError(f"the draft model: {error}") from None
        return [text.guess for text in texts]

    def release(self, job: Job) -> None:
        text = self._texts.pop(job, None)
        if text is not None:
            self._give(text)

    def _give(self, text: Text) -> None:
        if text.slot is not None and not self._batches.closed:
            self._batches.slots.give(text.slot)
        text.slot = None

    def _agree(self, text: Text) -> None:
        """Takes from TEXT's sequence what was guessed wrong and reads what it lacks, but for a few
        tokens; where its context ends it begins anew with the latest half."""
        size, ids, slots = self._batches.engine.max_seq_len, text.job.ids, self._batches.slots
        self._batches.check_open()
        if len(ids) - text.start + text.most - 1 > size:
            self._give(text)
            text.start = len(ids) - max(1, size // 2)
        if text.slot is None:
            text.slot, text.length = slots.take(ids[text.start :]), len(ids) - text.start
        else:
            held, known = text.slot.tokens, text.agreed - text.start
            known += common_prefix(held[known:], ids[text.agreed :], len(ids) - text.agreed - 1)
            slots.trim(text.slot, min(known, len(held)))
        text.agreed = len(ids)
        while (missing := text.missing()) > TOGETHER:
            if text.job.cancelled:
                text.most = 0
                return
            self._forward([(text, text.following(min(missing - 1, self._batches.chunk)))])

    def _forward(self, parts: Sequence[tuple[Text, list[int]]]) -> None:
        """One forward pass of the draft model over tokens that its sequences lack; where none is
        left to compute, it gives the text's next guess."""
        rows: list[tuple[int, int, int, bool, int]] = []
        ready: list[Text] = []
        for text, tokens in parts:
            assert text.slot is not None
            if text.missing() == len(tokens):
                ready.append(text)
            last = len(tokens) - 1 if text in ready else None
            rows += [
                (token, text.slot.number, len(text.slot.tokens) + n, n == last, text.length)
                for n, token in enumerate(tokens)
            ]
        engine = self._batches.engine
        with self._batches.turns:
            self._batches.check_open()
            token, sequence, position, want, length = zip(*rows, strict=True)
            engine.forward(token, sequence, position, want, True, length)
            for text, tokens in parts:
                assert text.slot is not None
                text.slot.tokens += tokens
                held = len(text.slot.tokens)
                self.bytes_read += held * engine.info().kv_bytes_per_position
            for row, text in enumerate(ready):
                text.guess.append(self._choose(row, text))
            self._batches.counters.computed_tokens += len(rows)
            self.bytes_read += engine.config.step_bytes

    def _choose(self, row: int, text: Text) -> int:
        """What the text's own knobs and random numbers make of the draft model's logits."""
        job, guess = text.job, text.guess
        seen, said = job.seen(), job.said()
        if job.params.looks_back:
            seen, said = [*seen, *guess], said + len(guess)
        return self._batches.engine.sample(
            row, job.params, seen, job.completion, len(job.ids) + len(guess), said, text.mu
        )
