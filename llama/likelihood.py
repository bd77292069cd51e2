"""How likely a model finds given continuations of given contexts, without drawing a token.

Many are computed together, and what they share once: a context that several continuations have is
read once and forked, and a beginning that was read before is not read again. The numbers do not
depend on the company, as the engine's logits do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from llama.batch import MAX_ACTIVE, MAX_CHUNK, SHARE, Batches, Slot, common_prefix
from llama.errors import LlamaError

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, and of what continues it
PASS_LOGITS = 1 << 24  # that a forward pass may keep: 64 MiB


class Likelihood(NamedTuple):
    """Of a continuation."""

    logprob: float  # natural, summed over its tokens
    greedy: bool  # whether each token is the likeliest, of equals the smallest id


Numbered = tuple[int, Likelihood]  # a pair's number, and its continuation's


@dataclass
class Group:
    """The continuations of one context, each with the numbers of the pairs that ask for it."""

    context: list[int]
    options: defaultdict[tuple[int, ...], list[int]] = field(
        default_factory=lambda: defaultdict(list)
    )


@dataclass
class Reading:
    """IDS to be read into a sequence, and the tokens ASKED about behind ids[first], and each
    after it; FOUND is what the model says of them."""

    ids: list[int]
    first: int
    asked: list[list[int]]
    found: list[dict[int, Likelihood]] = field(default_factory=list)


def each(batches: Batches, pairs: Sequence[Pair]) -> Iterator[Numbered]:
    """(number, result) of each (context ids, continuation ids) of PAIRS, as they are known.
    Neither may be empty; both, but for the continuation's last token, must fit the context."""
    groups: dict[object, Group] = {}
    for number, (context, continuation) in enumerate(pairs):
        _check(batches, number, context, continuation)
        key, option = tuple(context), tuple(continuation)
        # where keys depend on how long the whole text is, texts share nothing
        alone = batches.engine.config.rope_length(len(key) + len(option) - 1)
        group = groups.setdefault((key, option if alone else ()), Group(list(key)))
        group.options[option].append(number)
    wave: list[Group] = []
    for group in sorted(groups.values(), key=lambda group: group.context):
        known, _ = batches.slots.longest(group.context)
        if len(wave) == MAX_ACTIVE or any(
            common_prefix(group.context, other.context, len(group.context)) >= known + SHARE
            for other in wave  # the same beginning is about to be read: it will be forked
        ):
            yield from _compute(batches, wave)
            wave = []
        wave.append(group)
    yield from _compute(batches, wave)


def _check(
    batches: Batches, number: int, context: Sequence[int], continuation: Sequence[int]
) -> None:
    vocab_size, room = batches.engine.config.vocab_size, batches.engine.max_seq_len
    for name, ids in (("context", context), ("continuation", continuation)):
        if not ids:
            raise LlamaError(f"pair {number}: the {name} is empty")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise LlamaError(f"pair {number}: token ids must be 0 to {vocab_size - 1}")
    if len(context) + len(continuation) - 1 > room:
        raise LlamaError(
            f"pair {number}: {len(context)} and {len(continuation)} tokens, of which all but the "
            f"last must fit the context of {room}"
        )


def _compute(batches: Batches, wave: Sequence[Group]) -> Iterator[Numbered]:
    """A lone continuation is read with its context. Of several the context comes first; what it
    says of their first tokens is all that those of one token need."""
    with ExitStack() as held:
        readings = []
        for group in wave:
            options = list(group.options)
            ids, asked = group.context, [sorted({option[0] for option in options})]
            if len(options) == 1:
                ids, asked = [*ids, *options[0][:-1]], [[token] for token in options[0]]
            readings.append(Reading(ids, len(group.context) - 1, asked))
        _read(batches, readings, held)
        for group, reading in zip(wave, readings, strict=True):
            options = list(group.options)
            for start in range(0, len(options), MAX_ACTIVE):
                part = options[start : start + MAX_ACTIVE]
                rests = [
                    Reading([*group.context, *option[:-1]], len(group.context),
                            [[token] for token in option[len(reading.found) :]])
                    for option in part
                ]  # fmt: skip
                with ExitStack() as forks:
                    _read(batches, [rest for rest in rests if rest.asked], forks)
                for option, rest in zip(part, rests, strict=True):
                    result = _together(option, [*reading.found, *rest.found])
                    yield from ((number, result) for number in group.options[option])


def _together(option: Sequence[int], found: Sequence[dict[int, Likelihood]]) -> Likelihood:
    tokens = [said[token] for token, said in zip(option, found, strict=True)]
    return Likelihood(sum(one.logprob for one in tokens), all(one.greedy for one in tokens))


def _read(batches: Batches, readings: Sequence[Reading], held: ExitStack) -> None:
    """Answers READINGS, as many tokens of them in one forward pass as fit; their sequences are
    given back when HELD ends."""
    vocab_size = batches.engine.config.vocab_size
    limit = max(1, min(MAX_CHUNK, PASS_LOGITS // vocab_size))
    rows: list[tuple[Reading, Slot, int]] = []  # and the position
    for reading in readings:
        batches.check_open()
        # what is asked about must be computed, even if it was before
        known = reading.ids[: reading.first + 1]
        alone = batches.engine.config.rope_length(len(reading.ids))
        slot = batches.slots.take(reading.ids if alone else known, reuse=not alone)
        held.callback(_give, batches, slot)
        rows += [(reading, slot, at) for at in range(len(slot.tokens), len(reading.ids))]
    for start in range(0, len(rows), limit):
        _pass(batches, rows[start : start + limit])


def _give(batches: Batches, slot: Slot) -> None:
    if not batches.closed:
        batches.slots.give(slot)


def _pass(batches: Batches, rows: Sequence[tuple[Reading, Slot, int]]) -> None:
    """One forward pass, and what it says of the tokens that are asked about."""
    with batches.turns:
        batches.check_open()
        engine = batches.engine
        engine.forward(
            [reading.ids[at] for reading, _, at in rows], [slot.number for _, slot, _ in rows],
            [at for *_, at in rows], [at >= reading.first for reading, _, at in rows], True,
            [len(reading.ids) for reading, *_ in rows],
        )  # fmt: skip
        kept = 0
        for reading, slot, at in rows:
            slot.tokens.append(reading.ids[at])
            batches.counters.computed_tokens += 1
            if at >= reading.first:
                said = {}
                for token in reading.asked[at - reading.first]:
                    logprob, top = engine.logprobs(kept, token, 1)
                    said[token] = Likelihood(logprob, token in top)
                reading.found.append(said)
                kept += 1
