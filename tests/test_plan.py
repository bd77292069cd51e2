"""The knapsack behind --size and --max-kld against trying every choice, and sizes as people type
them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import plan
from llama.errors import LlamaError
from llama.plan import Frontier, Option, drawn, read_size, useful
from llama.quant import Kind

KINDS = (Kind.Q4, Kind.Q8, Kind.F16)
# losses that add up exactly, so that the best is the best to the last bit
TENSOR = st.lists(
    st.tuples(st.integers(1, 40).map(lambda n: 64 * n), st.integers(0, 50).map(float)),
    min_size=1, max_size=3,
).map(lambda few: [Option(KINDS[i], *one) for i, one in enumerate(sorted(few))])  # fmt: skip


def totals(chosen: tuple[Option, ...] | list[Option]) -> tuple[int, float]:
    return sum(o.bytes for o in chosen), sum(o.loss for o in chosen)


@settings(max_examples=300)
@given(st.lists(TENSOR, min_size=1, max_size=6), st.floats(0, 1))
def test_the_best_of_all_choices(tensors: list[list[Option]], share: float) -> None:
    every = [totals(chosen) for chosen in itertools.product(*tensors)]
    frontier = Frontier(tensors)
    assert frontier.least_bytes == min(size for size, _ in every)
    budget = int(frontier.least_bytes + share * (max(every)[0] - frontier.least_bytes))
    found = frontier.within(budget)
    assert all(option in few for option, few in zip(found, tensors, strict=True))
    size, loss = totals(found)
    assert size <= budget and loss == min(loss for size, loss in every if size <= budget)
    assert size == min(size for size, other in every if other <= loss)  # and no larger than it must
    most = share * max(loss for _, loss in every)
    size, loss = totals(frontier.below(most))
    good = [size for size, loss in every if loss <= most]
    assert size == min(good) if good else loss == min(loss for _, loss in every)
    assert loss <= most or not good


@settings(max_examples=100)
@given(st.lists(TENSOR, min_size=2, max_size=6), st.integers(1, 12000))
def test_sizes_without_a_common_step(tensors: list[list[Option]], extra: int) -> None:
    """Rounded up to steps: the promise is kept, and no more than a step a tensor is lost."""
    for few in tensors:  # one byte more for each: 1 is all they have in common
        few[-1] = Option(few[-1].kind, few[-1].bytes + 1, few[-1].loss)
    most, plan.MOST_STEPS = plan.MOST_STEPS, 50
    try:
        frontier = Frontier(tensors)
    finally:
        plan.MOST_STEPS = most
    budget = frontier.least_bytes + extra
    chosen = frontier.within(budget)
    size, loss = totals(chosen)
    step = math.ceil((frontier.most_bytes - frontier.least_bytes) / 50) * len(tensors)
    every = [totals(chosen) for chosen in itertools.product(*tensors)]
    assert size <= budget
    assert loss <= min((loss for size, loss in every if size <= budget - step), default=math.inf)
    for i, one in enumerate(chosen):  # and nothing that would help fits any more
        for other in tensors[i]:
            assert other.loss >= one.loss or size + other.bytes - one.bytes > budget


def test_a_model_of_real_size() -> None:
    """224 matrices of Llama 2 7B's sizes: more bytes never lose more, and are used."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    tensors = [
        [Option(kind, rows * columns * bits // 16, (layer + 1) * 1e-3 / 4**bits * (place + 1))
         for kind, bits in zip(KINDS, (9, 17, 32), strict=True)]
        for layer in range(32) for place, (rows, columns) in enumerate(shapes)
    ]  # fmt: skip
    frontier = Frontier(tensors)
    losses = []
    for budget in range(int(3.7e9), int(8e9), int(2e8)):
        chosen = frontier.within(budget)
        size, loss = totals(chosen)
        steps = [few[few.index(one) + 1].bytes - one.bytes
                 for few, one in zip(tensors, chosen, strict=True) if one != few[-1]]  # fmt: skip
        assert budget - min(steps) < size <= budget  # what is left is less than any step
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)


def test_what_brings_nothing_is_no_option() -> None:
    exact = [Option(Kind.Q8, 200, 0.0), Option(Kind.F16, 400, 0.0), Option(Kind.Q4, 100, 1.0)]
    assert [option.kind for option in useful(exact)] == [Kind.Q4, Kind.Q8]
    same = [Option(Kind.Q8, 64, 0.5), Option(Kind.Q4, 64, 0.7)]
    assert [option.kind for option in useful(same)] == [Kind.Q8]


@pytest.mark.parametrize(
    ("text", "size"),
    [("3.9GB", 3_900_000_000), ("700MiB", 700 << 20), ("123456789", 123456789),
     ("1.5 gib", 3 << 29), ("10kB", 10_000), ("5B", 5), (" 2 TB ", 2 * 10**12)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "x", "-3GB", "0", "nan", "inf GB", "1e30", "3.9G B", "3,9GB", "4GBs", "0x10"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(LlamaError, match=r"--size is .*, expected a size such as 3\.9GB"):
        read_size(text)


def test_how_kinds_are_drawn() -> None:
    assert drawn(["q8"]) == drawn(["q8", "q8"]) == "q8"
    assert drawn(["q4", "q8", "f16", "bf16", "f32"]) == "48fbF"
