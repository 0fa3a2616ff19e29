# ruff: noqa: NPY002 - NumPy's global generator is one of those that have to be exact
from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train import runs

from keepstep.train import rng
from keepstep.train.data.generators import Replacement, find_generators
from keepstep.train.data.memory import PassMemory, sampler_parts
from keepstep.train.data.order import Chunked, Listed, Streamed, derive_seed, draw_order


def draws() -> list[Any]:
    return [torch.rand(1).item(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]


def test_capture_and_restore() -> None:
    np.random.randn()
    random.gauss(0, 1)
    state = rng.capture()
    expected = draws()
    runs.disturb()
    rng.restore(state)
    assert draws() == expected


class Devices:
    """What torch says of the accelerators that a process sees, and does to them."""

    def __init__(self, count: int, current: int) -> None:
        self.count, self.current = count, current
        self.states = [torch.tensor([100 * current + number]) for number in range(count)]

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return self.current

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return self.states

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        for number, state in enumerate(states):
            self.states[number] = state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.states[self.current] = state


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (Devices(8, 5), [500, 501, 502, 503, 504, 505, 506, 507]),
        (Devices(4, 1), [100, 505, 102, 103]),  # on two machines instead of one
        (Devices(1, 0), [505]),  # each process sees one device alone
    ],
)
def test_a_device_goes_on_whatever_its_number_is_now(
    now: Devices, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rng, "_device_module", lambda: Devices(8, 5))
    saved = rng.capture()
    monkeypatch.setattr(rng, "_device_module", lambda: now)
    rng.restore(saved)
    assert [int(state) for state in now.states] == expected


def test_isolation_holds_when_a_block_fails_and_when_nested() -> None:
    inner = []

    def fail() -> None:
        with rng.isolated(5):
            draws()
            with rng.isolated(6):
                inner.append(draws())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after = draws()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    assert draws() == after
    with rng.isolated(6):
        assert [draws()] == inner


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_seeding_is_that_of_each_library(seed: int) -> None:
    random.gauss(0, 1)
    rng.seed_globals(seed)
    seeded = draws()
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    assert draws() == seeded


def test_a_paused_stream_is_unbroken() -> None:
    with rng.isolated(9):
        expected = [draws() for _ in range(3)]
    stream = rng.PausedRandomness(9)
    got = []
    for _ in range(3):
        with stream:
            got.append(draws())
        draws()
    assert got == expected


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4), st.integers(0, 3))
def test_seeds_fit_every_generator_and_differ(parts: list[int], at: int) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    changed = list(parts)
    changed[at % len(parts)] += 1
    assert derive_seed(*changed) != seed


def test_seeds_are_the_same_in_every_version() -> None:
    assert derive_seed(1, 2, 3) == 6520558355739401531


@given(st.integers(0, 40), st.integers(1, 9), st.booleans(), st.integers(0, 12))
def test_every_order_can_be_entered_anywhere(length: int, size: int, drop: bool, position: int) -> None:
    indices = list(range(100, 100 + length))
    expected = [indices[begin : begin + size] for begin in range(0, length, size)]
    if drop:
        expected = [batch for batch in expected if len(batch) == size]
    chunked = Chunked(indices=indices, batch_size=size, drop_last=drop)
    streamed = Streamed(expected, 1)
    for order in (chunked, Listed(items=expected), streamed):
        assert list(order.start_at(position)) == expected[position:]
        assert order.length == len(expected)


def test_a_stream_knows_its_last_item_when_it_gives_it_out() -> None:
    order = Streamed(iter([1, 2]), 1)
    items = order.start_at(0)
    assert (next(items), order.length) == (1, None)
    assert (next(items), order.length) == (2, 2)


def test_the_users_generator_is_never_drawn_from() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    sampler = torch.utils.data.RandomSampler(range(9), generator=generator)
    order = draw_order(runs.batches_of(sampler), seed=3, pass_number=0)
    assert sorted(index for batch in order.start_at(0) for index in batch) == list(range(9))
    assert sampler.generator is generator
    assert torch.equal(generator.get_state(), before)


def test_generators_are_found_where_they_are_kept() -> None:
    class Flip:
        def __init__(self) -> None:
            self.rng = random.Random(1)

        def __call__(self, value: Any) -> Any:
            return value

    class Deep(runs.Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.transforms = [Flip(), Flip()]
            self.generator = torch.Generator()
            self.legacy = np.random.RandomState(1)
            self.shared = self.legacy
            self.system = random.SystemRandom()
            self.me = self

    subset: Any = torch.utils.data.Subset(Deep(), range(3))
    kept = find_generators(subset)
    assert sorted(name for _, name in kept) == ["generator", "legacy", "rng", "rng", "shared"]
    deep = subset.dataset
    mine = deep.legacy, deep.generator, deep.transforms[0].rng
    replacement = Replacement(kept, 5)
    with replacement:
        assert deep.legacy is deep.shared
        assert deep.legacy is not mine[0]
        first = deep.legacy.rand(), deep.transforms[0].rng.random(), torch.rand(1, generator=deep.generator)
    assert (deep.legacy, deep.generator, deep.transforms[0].rng) == mine
    with replacement:
        assert deep.legacy.rand() != first[0]
    with Replacement(kept, 5):
        again = deep.legacy.rand(), deep.transforms[0].rng.random(), torch.rand(1, generator=deep.generator)
    assert again == first


def test_generators_are_found_in_containers_helpers_and_behind_methods() -> None:
    class Helper:
        def __init__(self) -> None:
            self.rng = random.Random(1)

        def apply(self, *_: Any) -> float:
            return self.rng.random()

    class Holder(runs.Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.helper = Helper()
            self.by_name = {"one": random.Random(2)}
            self.listed = [random.Random(3)]
            self.partial = partial(Helper().apply, rng=random.Random(4))

    for root, expected in ((Holder(), 5), (Helper().apply, 1), (partial(Helper().apply), 1)):
        kept = find_generators(root)
        assert len(kept) == expected
        before = [owner[name] for owner, name in kept]
        with Replacement(kept, 5):
            assert not any(owner[name] is mine for (owner, name), mine in zip(kept, before, strict=True))
        assert all(owner[name] is mine for (owner, name), mine in zip(kept, before, strict=True))


def test_a_changed_option_is_not_overwritten_by_what_was_remembered() -> None:
    class Sampler(runs.CountingSampler):
        def __init__(self, length: int) -> None:
            super().__init__(length)
            self.later: int

        def __iter__(self) -> Any:
            self.later = self.times
            return super().__iter__()

    old = Sampler(10)
    memory = PassMemory(sampler_parts(old))
    list(old)
    list(old)
    remembered = memory.read()
    assert remembered == [{"moved": {"times": 2, "later": 1}}]
    new = Sampler(12)
    PassMemory(sampler_parts(new)).write(remembered)
    assert (new.length, new.times, new.later) == (12, 2, 1)


def test_the_memory_of_pythons_generator_is_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(3)
    memory = rng.memory_of(generator)
    assert memory is not None, "CPython's; if it moved its generators, isolating a batch costs 10 us more"
    before = memory.tobytes()
    state, expected = generator.getstate(), [generator.random() for _ in range(700)]
    memory[:] = before
    assert generator.getstate() == state
    assert [generator.random() for _ in range(700)] == expected
    for other in (random.SystemRandom(), type("Own", (random.Random,), {})(), None):
        assert rng.memory_of(other) is None
    monkeypatch.setattr(rng, "_python_memory", None)
    test_isolation_holds_when_a_block_fails_and_when_nested()
    test_a_paused_stream_is_unbroken()
