"""What each rank gets of a pass: the same as under Accelerate, and nothing twice or never."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from keepstep.errors import UsageError
from keepstep.train.data.order import Chunked, Listed, Order, Streamed
from keepstep.train.data.shares import Plan, Share, check_split


def chunked(length: int, batch_size: int, drop_last: bool) -> Chunked:
    return Chunked(indices=range(length), batch_size=batch_size, drop_last=drop_last)


def ranks(size: int, *, split: bool = False, even: bool = True) -> list[Share]:
    return [Share(rank=rank, size=size, split=split, even=even) for rank in range(size)]


def given_out(
    order: Order, share: Share, *, batch_size: int | None, drop_last: bool = False, start: int = 0
) -> tuple[list[Any], Plan]:
    """What a rank loads, and its plan; checks that the plan knows its end in time."""
    plan = Plan(order, share, batch_size=batch_size, drop_last=drop_last, start=start)
    batches = []
    position = start
    portions = iter(plan.portions())
    for portion in portions:
        batches.append(portion.indices)
        position += share.stride
    assert plan.end is not None
    if batches:
        assert position - share.stride < plan.end <= position
    else:
        assert plan.end <= start
    return batches, plan


LENGTHS = [0, 1, 2, 3, 5, 8, 11, 16, 17, 22, 24, 31]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("split", [False, True])
def test_ranks_get_what_accelerate_gives_them(split: bool, even: bool, drop_last: bool) -> None:
    for length in LENGTHS:
        for batch_size in (1, 2, 4, 6, 8):
            for size in (2, 3, 4):
                if split and batch_size % size:
                    continue
                for share in ranks(size, split=split, even=even):
                    sampler = BatchSampler(SequentialSampler(range(length)), batch_size, drop_last)
                    shard = BatchSamplerShard(sampler, size, share.rank, split, even)
                    expected = [list(batch) for batch in shard]
                    order = chunked(length, batch_size, drop_last)
                    options = {"batch_size": batch_size, "drop_last": drop_last}
                    case = (length, batch_size, share)
                    assert given_out(order, share, **options)[0] == expected, case
                    drawn = Streamed(sampler, 0)
                    assert given_out(drawn, share, **options)[0] == expected, case
                    assert share.batches(order.length, drop_last) == len(shard), case


def test_units_of_several_sizes_are_repeated_whole() -> None:
    units = [[0, 1, 2], [3], [4, 5], [6, 7, 8], [9]]
    for size in (2, 3, 4, 7):
        for share in ranks(size):

            class Own:
                def __iter__(self) -> Iterator[list[int]]:
                    return iter([list(unit) for unit in units])

                def __len__(self) -> int:
                    return len(units)

            expected = list(BatchSamplerShard(Own(), size, share.rank))
            assert given_out(Listed(items=units), share, batch_size=None)[0] == expected


def test_samples_that_are_not_collated_are_shared_one_by_one() -> None:
    everyone = [given_out(Listed(items=range(5)), share, batch_size=None)[0] for share in ranks(2)]
    assert everyone == [[0, 2, 4], [1, 3, 0]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_change_of_ranks_loses_and_repeats_nothing(data: st.DataObject) -> None:
    """Any number of stops, each going on with another number of ranks, and even split or not."""
    batch_size = data.draw(st.sampled_from([1, 2, 4, 8, 12]), "batch size")
    length = data.draw(st.integers(0, 80), "length")
    even = data.draw(st.booleans(), "even")
    drop_last = data.draw(st.booleans(), "drop_last")
    streamed = data.draw(st.booleans(), "streamed")
    seen: Counter[int] = Counter()
    position, fillers = 0, 0
    units = chunked(length, batch_size, drop_last).length
    while position < units:
        size = data.draw(st.integers(1, 5), "ranks")
        split = batch_size % size == 0 and data.draw(st.booleans(), "split")
        options = {"batch_size": batch_size, "drop_last": drop_last, "start": position}
        plans = []
        for share in ranks(size, split=split, even=even):
            order: Order = chunked(length, batch_size, drop_last)
            if streamed:
                order = Streamed(BatchSampler(SequentialSampler(range(length)), batch_size, drop_last), 0)
            plans.append(given_out(order, share, **options))
        steps = max(len(batches) for batches, _ in plans)
        stop = data.draw(st.integers(1, steps + 1), "steps") if steps else 1
        for step in range(min(stop, steps)):
            for batches, _ in plans:
                seen.update(batches[step] if step < len(batches) else [])
        if stop >= steps:
            gathered = [
                index for batches, _ in plans if len(batches) == steps and steps for index in batches[-1]
            ]
            if size > 1 and steps:
                real = plans[0][1].remainder or len(gathered)
                expected = list(range(max(plan.end for _, plan in plans) * batch_size))[:length]
                assert gathered[:real] == expected[len(expected) - real :]
                fillers = len(gathered) - real
        if stop > steps:
            break
        position += stop * (1 if split else size)
    everything = range(units * batch_size if drop_last else length)
    dropped = sum(1 for index in everything if not seen[index])
    assert dropped < (5 * batch_size if drop_last else 1)
    assert seen.total() == len(everything) - dropped + fillers


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    size=st.integers(2, 5),
    start=st.integers(0, 70),
)
def test_even_ranks_get_equally_many_batches_of_one_size(
    length: int, batch_size: int, size: int, start: int
) -> None:
    everyone = [
        given_out(chunked(length, batch_size, False), share, batch_size=batch_size, start=start)[0]
        for share in ranks(size)
    ]
    assert len({len(batches) for batches in everyone}) == 1
    assert {len(batch) for batches in everyone for batch in batches} <= {batch_size}


def test_parts_of_a_unit_are_told_apart() -> None:
    plan = Plan(
        chunked(8, 4, False), Share(rank=1, size=2, split=True), batch_size=4, drop_last=False, start=1
    )
    assert [(portion.unit, portion.part, portion.indices) for portion in plan.portions()] == [(1, 1, [6, 7])]


@pytest.mark.parametrize(
    ("batch_size", "message"), [(5, "batch size is 5 .* 2 ranks"), (None, "no batch_size")]
)
def test_what_cannot_be_split_is_refused(batch_size: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_split(Share(size=2, split=True), batch_size)
    check_split(Share(size=1, split=True), batch_size)
    check_split(Share(size=2), batch_size)


def test_orders_that_differ_have_different_digests() -> None:
    orders = [
        chunked(8, 4, False),
        chunked(8, 2, False),
        chunked(9, 4, False),
        Listed(items=[0, 1, 2]),
        Listed(items=[0, 2, 1]),
        Listed(items=[[0, 1], [2]]),
        Listed(items=[[0], [1, 2]]),
        Listed(items=["a", ("b", 1)]),
        Listed(items=["a", ("b", 2)]),
    ]
    assert len({order.digest() for order in orders}) == len(orders)
    assert Listed(items=[object()]).digest() == Listed(items=[object()]).digest()
