"""Many texts over one engine: who uses which sequence, and what each forward pass computes.

A prompt continues or forks the sequence that shares its longest beginning, so only what follows
is computed. Each step is one forward pass: a token of every running completion, and as much of
the waiting prompts as fits in a chunk, so nobody's text stops while another's prompt is read.
Results do not depend on the company: the engine's logits are the same alone and in any batch.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llama.completion import Job
from llama.errors import LlamaError
from llama.turns import Turns

if TYPE_CHECKING:
    from llama.engine import Engine
    from llama.speculate import Proposer

MAX_ACTIVE = 16  # completions that run together; more wait for a place
MAX_IDLE = 16  # sequences kept for the prompts to come
MAX_CHUNK = 256  # tokens of one forward pass
MAX_VERIFIED = 64  # of one with drafted tokens: each yields logits, and takes room for them
MIN_CHUNK = 32
CHUNK_SECONDS = 0.5  # and no more than take so long: Ctrl-C is heard between passes
SHARE = 16  # tokens in common with a prompt being read that are worth waiting for


@dataclass
class Counters:
    """What an engine did since it was opened. Steps that hold prompt tokens count as prompt."""

    computed_tokens: int = 0  # every token that went through the network
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_steps: int = 0  # forward passes without prompt tokens,
    decode_tokens: int = 0  # the tokens they gave,
    decode_positions: int = 0  # and the cached positions that these looked at
    decode_seconds: float = 0.0  # drafting included
    drafted_tokens: int = 0  # tokens proposed to those passes,
    accepted_tokens: int = 0  # and how many of them became text
    draft_bytes: int = 0  # what a draft model read


@dataclass
class Part:
    """What one job has in a forward pass: COUNT of its ids from START on, and drafted tokens that
    may turn out to follow them."""

    job: Job
    start: int
    count: int
    draft: list[int]

    def rows(self) -> list[tuple[int, int, int, bool, int]]:
        """(token, sequence, position, whether it yields logits, rope length) of each token."""
        job, slot, first = self.job, self.job.slot, self.start
        assert slot is not None
        tokens = job.ids[first : first + self.count] + self.draft
        return [
            (token, slot.number, len(slot.tokens) + n,
             job.scores_prompt or first + n >= len(job.ids) - 1, job.n_prompt)
            for n, token in enumerate(tokens)
        ]  # fmt: skip


class Slot:
    """A sequence of the engine and the tokens that its cache holds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.fresh = 2**31  # after a slide: so many of them alone are as a fresh run has them
        self.rope_length = 0  # that its keys were computed for, see Config.rope_length
        self.used = 0  # when, by the clock of Slots


class Slots:
    """The engine's sequences. Idle ones keep their tokens until there are too many of them or
    they hold more positions than one context."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._given: deque[Slot] = deque()  # back from their users, not yet among the idle
        self._free = list(range(engine.MAX_SEQUENCES - 1, -1, -1))
        self._idle: list[Slot] = []
        self._busy: list[Slot] = []
        self._clock = 0

    def longest(self, prompt: Sequence[int]) -> tuple[int, Slot | None]:
        """How many of PROMPT's first tokens are computed already, and where. Never all of them:
        the last one must be computed to have its logits."""
        with self._lock:
            return self._longest(prompt)

    def take(self, prompt: Sequence[int], reuse: bool = True, whole: bool = False) -> Slot:
        """A sequence that holds as much of PROMPT's beginning as any does; WHOLE: even all of it,
        for one whose logits are known."""
        with self._lock:
            self._collect()
            n, best = self._longest(prompt, whole) if reuse else (0, None)
            if best is not None and best in self._idle and n == len(best.tokens):
                self._idle.remove(best)  # it would be continued: nothing is lost
                slot = best
            else:
                slot = self._fresh(best)
                if best is not None:
                    try:
                        self._engine.fork(best.number, slot.number, n)
                    except LlamaError:
                        self._free.append(slot.number)
                        raise
                    slot.tokens = best.tokens[:n]
                    self._touch(best)
            slot.rope_length = self._engine.config.rope_length(len(prompt))
            self._busy.append(slot)
            # A KeyboardInterrupt may have come between a forward pass and the note of it.
            self._engine.trim(slot.number, n)
            self._touch(slot)
            return slot

    def trim(self, slot: Slot, length: int) -> None:
        """Forgets SLOT's tokens from LENGTH on, computed ones that were never noted included."""
        with self._lock:  # nobody forks it meanwhile
            del slot.tokens[length:]
            self._engine.trim(slot.number, length)

    def slide(self, slot: Slot, first: int, count: int) -> None:
        """Drops SLOT's tokens [first, first + count). Those behind them remember the dropped ones,
        so no other prompt may ever continue from them."""
        with self._lock:  # nobody forks it meanwhile
            slot.fresh = min(slot.fresh, first)
            self._engine.slide(slot.number, first, count)
            del slot.tokens[first : first + count]

    def give(self, slot: Slot) -> None:
        """The sequence is idle now; what it holds may be of use later."""
        self._given.append(slot)
        # The garbage collector may end a dropped stream at any moment, even inside take(): then
        # the lock is held by this very thread, and the next to come collects.
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._given:
            slot = self._given.popleft()
            self._busy.remove(slot)
            self._idle.append(slot)
            if len(slot.tokens) > slot.fresh:
                self._engine.trim(slot.number, slot.fresh)
                del slot.tokens[slot.fresh :]
            slot.fresh = 2**31
            self._touch(slot)
            held = sum(len(idle.tokens) for idle in self._idle)
            while len(self._idle) > 1 and (
                len(self._idle) > MAX_IDLE or held > self._engine.max_seq_len
            ):
                held -= len(self._forget(slot).tokens)

    def _longest(self, prompt: Sequence[int], whole: bool = False) -> tuple[int, Slot | None]:
        best, found = 0, None
        length = self._engine.config.rope_length(len(prompt))
        for slot in [*self._idle, *self._busy]:
            if slot.rope_length != length:
                continue
            n = common_prefix(slot.tokens, prompt, min(len(prompt) - (not whole), slot.fresh))
            if n > best:
                best, found = n, slot
        return best, found

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock

    def _fresh(self, keep: Slot | None) -> Slot:
        if not self._free and any(idle is not keep for idle in self._idle):
            self._forget(keep)
        if not self._free:
            raise LlamaError(
                f"all {self._engine.MAX_SEQUENCES} sequences are in use; close the streams that "
                "nobody reads"
            )
        return Slot(self._free.pop())

    def _forget(self, keep: Slot | None) -> Slot:
        oldest = min((s for s in self._idle if s is not keep), key=lambda slot: slot.used)
        self._engine.trim(oldest.number, 0)
        self._idle.remove(oldest)
        self._free.append(oldest.number)
        return oldest


_all: weakref.WeakSet[Batches] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: deque(map(Batches.forked, _all), 0))


class Batches:
    """Runs completions, step by step. Several threads may: each has its own run, and their
    forward passes take turns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.proposer: Proposer | None = None  # of tokens that may follow, to check several at once
        self.slots = Slots(engine)
        self.counters = Counters()
        self.turns = Turns()
        self.closed = ""  # why nobody may use it any more
        self._chunk = 64  # until the first prompt shows how fast this machine is
        _all.add(self)

    def forked(self) -> None:
        """In a forked process: the engine is its parent's, and who holds a lock is not here."""
        self.closed = "belongs to another process, which forked: open one here"
        self.turns, self.slots = Turns(), Slots(self.engine)

    @property
    def chunk(self) -> int:
        """Tokens that a forward pass should have at most."""
        return self._chunk

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        """Completes JOBS, MAX_ACTIVE at a time, and yields each with its next text, at the last
        with its result. Abandoned midway it leaves the engine ready for others."""
        waiting = deque(jobs)
        active: list[Job] = []
        try:
            while waiting or active:
                for job in [j for j in (*active, *waiting) if j.cancelled or j.full()]:
                    (active if job in active else waiting).remove(job)
                    self._release(job)
                    yield job, job.end("cancelled" if job.cancelled else "length")
                self._admit(waiting, active)
                self._make_room(active)
                for job, text in self._step(active, waiting) if active else ():
                    if job.result is not None:
                        active.remove(job)
                        self._release(job)
                    if text or job.result is not None:
                        yield job, text
        finally:
            for job in active:
                self._release(job)

    def _release(self, job: Job) -> None:
        if job.slot is not None and not self.closed:
            self.slots.give(job.slot)
        job.slot = None
        if self.proposer is not None:
            self.proposer.release(job)

    def _admit(self, waiting: deque[Job], active: list[Job]) -> None:
        while waiting and len(active) < MAX_ACTIVE:
            prompt = waiting[0].ids
            scored = waiting[0].scores_prompt  # which shares nothing, to have every row's logits
            known, _ = self.slots.longest(prompt)
            length = self.engine.config.rope_length(len(prompt))
            if any(
                job.slot is not None and job.computed() < job.n_prompt
                and (job is waiting[0].leader or (
                    not scored and job.slot.rope_length == length
                    and common_prefix(job.ids, prompt, len(prompt) - 1) >= known + SHARE))
                for job in active
            ):  # fmt: skip
                return  # the same beginning is being read right now: it will be forked
            job = waiting[0]
            job.slot = self.slots.take(prompt, reuse=not scored)
            job.start(cached=len(job.slot.tokens))
            active.append(waiting.popleft())

    def _join(self, leader: Job, waiting: deque[Job], active: list[Job]) -> list[Job]:
        """The waiting completions of LEADER's prompt, which was read this moment: they begin with
        its logits, and nothing of the prompt is computed for them."""
        joined: list[Job] = []
        while waiting and waiting[0].leader is leader and len(active) < MAX_ACTIVE:
            job = waiting[0]
            job.slot = self.slots.take(job.ids, whole=True)
            job.start(cached=job.n_prompt)
            active.append(waiting.popleft())
            joined.append(job)
        return joined

    def _make_room(self, active: list[Job]) -> None:
        """Slides the windows of those whose context is full; others end before that."""
        for job in active:
            assert job.slot is not None
            if len(job.slot.tokens) == self.engine.max_seq_len:
                with self.turns:
                    self.check_open()
                    self.slots.slide(job.slot, *job.window.slide(len(job.slot.tokens)))

    def _step(self, active: list[Job], waiting: deque[Job]) -> Iterator[tuple[Job, str]]:
        """One forward pass; the jobs that it gave tokens, and the text that these became."""
        began = time.perf_counter()
        drafts = self._drafts(active)
        drafting = time.perf_counter() - began
        plan = []
        room = self._chunk - len(active)  # a place for each; the rest for prompts, first come
        for job, draft in zip(active, drafts, strict=True):
            left = len(job.ids) - job.computed()
            count = min(left, 1 + max(room, 0))
            room -= count - 1
            plan.append(Part(job, job.computed(), count, draft))
        rows = [part.rows() for part in plan]
        tokens, sequences, positions, want, lengths = zip(*chain(*rows), strict=True)
        texts: dict[Job, str] = {}
        error: LlamaError | None = None
        with self.turns:
            self.check_open()
            began = time.perf_counter()
            self.engine.forward(tokens, sequences, positions, want, True, lengths)
            for part in plan:
                assert part.job.slot is not None
                part.job.slot.tokens += part.job.ids[part.start : part.start + part.count]
            try:
                first = 0  # of the rows that yield logits
                for part, own in zip(plan, rows, strict=True):
                    self._take(part, first, texts, waiting, active)
                    first += sum(row[3] for row in own)
            except LlamaError as found:
                error = found
            held = sum(own[-1][2] + 1 for own in rows)
            self._count(plan, held, drafting + time.perf_counter() - began)
        yield from texts.items()
        if error is not None:  # the texts before it are whole
            raise error

    def _drafts(self, active: list[Job]) -> list[list[int]]:
        """What may follow each text. Nothing while a prompt is read: a row costs as much there as
        one of the prompt's."""
        if self.proposer is None or any(len(job.ids) == job.n_prompt for job in active):
            return [[] for _ in active]
        room = (min(self._chunk, MAX_VERIFIED) - len(active)) // len(active)
        asked = []
        for job in active:
            assert job.slot is not None
            most = min(room, job.left() - 1, self.engine.max_seq_len - len(job.slot.tokens) - 1)
            asked.append((job, max(0, most)))
        size = self.engine.config.vocab_size
        found = self.proposer.propose(asked)
        self.counters.draft_bytes = self.proposer.bytes_read
        return [
            list(takewhile(lambda token: 0 <= token < size, draft[:most]))
            for draft, (_, most) in zip(found, asked, strict=True)
        ]

    def _take(
        self, part: Part, row: int, texts: dict[Job, str], waiting: deque[Job], active: list[Job]
    ) -> None:
        """What PART's logits, from ROW on, say: how likely a prompt's tokens are, and the text's
        next ones: drafted tokens for as long as they are what is sampled, and one more."""
        job, size, end = part.job, len(part.job.ids), part.start + part.count
        if job.scores_prompt:
            for following in range(part.start + 1, min(end + 1, size)):
                job.score(*self._logprobs(row, job, job.ids[following]))
                row += 1
        if end < size:
            return
        joined = self._join(job, waiting, active) if size == job.n_prompt else []
        for one in (job, *joined):
            self._push(row, one, texts)
        assert job.slot is not None
        for n, token in enumerate(part.draft, 1):
            if job.result is not None or job.ids[-1] != token:
                break
            job.slot.tokens.append(token)
            self._push(row + n, job, texts)
        if part.draft:
            self.slots.trim(job.slot, len(job.slot.tokens))

    def _push(self, row: int, job: Job, texts: dict[Job, str]) -> None:
        """Gives JOB its next token, from ROW's logits, and TEXTS what is certain of it."""
        texts.setdefault(job, "")
        texts[job] += job.push(self._choose(row, job))

    def _choose(self, row: int, job: Job) -> int:
        """The job's next token, from the logits kept in ROW."""
        token = self.engine.sample(
            row, job.params, job.seen(), job.completion, len(job.ids), job.said(), job.mu
        )
        if job.params.logprobs is not None:
            job.note(*self._logprobs(row, job, token))
        return token

    def _logprobs(self, row: int, job: Job, token: int) -> tuple[int, float, dict[int, float]]:
        return token, *self.engine.logprobs(row, token, job.params.logprobs or 0)

    def _count(self, plan: list[Part], positions: int, seconds: float) -> None:
        """Notes a pass whose sequences are POSITIONS long together, and what came of it."""
        counters = self.counters
        drafted = sum(len(part.draft) for part in plan)
        total = sum(part.count for part in plan) + drafted
        prompt = sum(part.count for part in plan if part.start < part.job.n_prompt)
        counters.computed_tokens += total
        if prompt:
            self._count_prompt(prompt, total, seconds)
            return
        new = [len(part.job.ids) - part.start - 1 for part in plan]
        counters.decode_steps += 1
        counters.decode_tokens += sum(new)
        counters.decode_positions += positions
        counters.drafted_tokens += drafted
        counters.accepted_tokens += sum(max(0, n - 1) for n in new)
        counters.decode_seconds += seconds

    def _count_prompt(self, tokens: int, total: int, seconds: float) -> None:
        """Notes a pass of TOTAL rows, TOKENS of them of prompts, and how many the next may have."""
        self.counters.prompt_tokens += tokens
        self.counters.prompt_seconds += seconds
        if total >= MIN_CHUNK:
            fits = int(CHUNK_SECONDS * total / max(seconds, 1e-6))
            self._chunk = max(MIN_CHUNK, min(MAX_CHUNK, fits)) // 16 * 16

    def outputs(
        self, texts: Sequence[Sequence[int]], wanted: Sequence[range], hidden: bool = False
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """What the head gives, or with HIDDEN what it reads, at the positions WANTED of each of
        TEXTS: (the text's number, (n, width)), piece by piece, a text's own pieces in order."""
        waiting = deque(range(len(texts)))
        active: dict[int, Slot] = {}
        try:
            while waiting or active:
                while waiting and len(active) < MAX_ACTIVE:
                    ids = texts[waiting[0]]
                    # a position that is kept from before gives nothing again
                    reuse = wanted[waiting[0]].start == len(ids) - 1
                    if reuse and self._awaited(ids, texts, active):
                        break
                    active[waiting.popleft()] = self.slots.take(ids, reuse)
                yield from self._read(texts, wanted, active, hidden)
                for n in [n for n, slot in active.items() if len(slot.tokens) == len(texts[n])]:
                    self.slots.give(active.pop(n))
        finally:
            for slot in active.values():
                if not self.closed:
                    self.slots.give(slot)

    def _awaited(
        self, ids: Sequence[int], texts: Sequence[Sequence[int]], active: dict[int, Slot]
    ) -> bool:
        """Whether a text being read has a beginning in common with IDS that is worth a fork."""
        known, _ = self.slots.longest(ids)
        length = self.engine.config.rope_length(len(ids))
        return any(
            slot.rope_length == length
            and common_prefix(texts[n], ids, len(ids) - 1) >= max(known, len(slot.tokens)) + SHARE
            for n, slot in active.items()
        )

    def _read(
        self, texts: Sequence[Sequence[int]], wanted: Sequence[range], active: dict[int, Slot],
        hidden: bool,
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:  # fmt: skip
        """One forward pass over as much of the active texts as fits in a chunk."""
        rows: list[tuple[int, int, int, bool, int]] = []
        parts: list[tuple[int, Sequence[int], int]] = []  # text, its tokens, how many are wanted
        for n, slot in active.items():
            start, size = len(slot.tokens), len(texts[n])
            places = range(start, min(size, start + self._chunk - len(rows)))
            want = [place in wanted[n] for place in places]
            part = texts[n][start : start + len(places)]
            rows += zip(part, [slot.number] * len(part), places, want, [size] * len(part),
                        strict=True)  # fmt: skip
            parts.append((n, part, sum(want)))
        tokens, sequences, positions, wants, lengths = zip(*rows, strict=True)
        with self.turns:
            self.check_open()
            began = time.perf_counter()
            out = self.engine.forward(
                tokens, sequences, positions, wants, rope_lengths=lengths, hidden=hidden
            )
            for n, part, _ in parts:
                active[n].tokens += part
            self.counters.computed_tokens += len(rows)
            self._count_prompt(len(rows), len(rows), time.perf_counter() - began)
        assert out is not None
        first = 0
        for n, _, count in parts:
            if count:
                yield n, out[first : first + count]
            first += count

    def check_open(self) -> None:
        if self.closed:
            raise LlamaError(f"this Llama {self.closed}")


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many first tokens A and B share, at most LIMIT."""
    low, high = 0, max(0, min(len(a), len(b), limit))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # the first LOW are equal, the first HIGH are not; slices compare fast
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
