"""Many texts over one engine: who uses which sequence, and what each forward pass computes.

A prompt continues or forks the sequence that shares its longest beginning, so only what follows
is computed. Each step is one forward pass: a token of every running completion, and as much of
the waiting prompts as fits in a chunk, so nobody's text stops while another's prompt is read.
Results do not depend on the company: the engine's logits are the same alone and in any batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llama.completion import Job
from llama.errors import LlamaError

if TYPE_CHECKING:
    from llama.engine import Engine

MAX_ACTIVE = 16  # completions that run together; more wait for a place
MAX_IDLE = 16  # sequences kept for the prompts to come
MAX_CHUNK = 256  # tokens of one forward pass
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
    decode_tokens: int = 0  # the tokens they computed,
    decode_positions: int = 0  # and the cached positions that these looked at
    decode_seconds: float = 0.0


class Turns:
    """A lock that threads get in the order in which they asked. A plain Lock would let a thread
    that steps in a loop take it again before the next in line wakes up."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._line: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._line.append(mine)
        try:
            mine.wait()
        except BaseException:
            with self._mutex:
                waiting = mine in self._line
                if waiting:
                    self._line.remove(mine)
            if not waiting:  # it was handed over just now: hand it on
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._line:
                self._line.popleft().set()
            else:
                self._held = False


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


class Batches:
    """Runs completions, step by step. Several threads may: each has its own run, and their
    forward passes take turns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.slots = Slots(engine)
        self.counters = Counters()
        self.turns = Turns()
        self.closed = False
        self._chunk = 64  # until the first prompt shows how fast this machine is

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
                for job, token in self._step(active, waiting) if active else ():
                    text = job.push(token)
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

    def _step(self, active: list[Job], waiting: deque[Job]) -> list[tuple[Job, int]]:
        """One forward pass; the jobs whose next token it gave, and those tokens."""
        plan: list[tuple[Job, int]] = []  # and how many tokens of each
        room = self._chunk - len(active)  # a place for each; the rest for prompts, first come
        for job in active:
            assert job.slot is not None
            left = len(job.ids) - job.computed()
            count = min(left, 1 + max(room, 0))
            room -= count - 1
            plan.append((job, count))
        tokens: list[int] = []
        sequences: list[int] = []
        positions: list[int] = []
        want: list[bool] = []
        lengths: list[int] = []
        wanted: list[tuple[Job, int]] = []  # whose logits, and which of its tokens follows
        for job, count in plan:
            assert job.slot is not None
            start, position = job.computed(), len(job.slot.tokens)
            tokens += job.ids[start : start + count]
            sequences += [job.slot.number] * count
            positions += range(position, position + count)
            lengths += [job.n_prompt] * count
            wants = [job.scores_prompt or at == len(job.ids) - 1
                     for at in range(start, start + count)]  # fmt: skip
            wanted += [(job, start + n + 1) for n, one in enumerate(wants) if one]
            want += wants
        with self.turns:
            self.check_open()
            began = time.perf_counter()
            self.engine.forward(tokens, sequences, positions, want, True, lengths)
            for job, count in plan:
                assert job.slot is not None
                start = job.computed()
                job.slot.tokens += job.ids[start : start + count]
            chosen = []
            for row, (job, following) in enumerate(wanted):
                if following < len(job.ids):
                    job.score(*self._logprobs(row, job, job.ids[following]))
                    continue
                first = len(job.ids) == job.n_prompt
                for one in [job, *(self._join(job, waiting, active) if first else ())]:
                    chosen.append((one, self._choose(row, one)))
            self._count(plan, positions, time.perf_counter() - began)
        return chosen

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

    def _count(self, plan: list[tuple[Job, int]], positions: list[int], seconds: float) -> None:
        counters = self.counters
        total = sum(count for _, count in plan)
        decoding = sum(count for job, count in plan if len(job.ids) > job.n_prompt)
        counters.computed_tokens += total
        if decoding == total:
            counters.decode_steps += 1
            counters.decode_tokens += total
            counters.decode_positions += sum(positions) + total
            counters.decode_seconds += seconds
            return
        self._count_prompt(total - decoding, total, seconds)

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
            raise LlamaError("this Llama is closed")


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
