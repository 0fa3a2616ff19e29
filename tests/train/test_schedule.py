from __future__ import annotations

import pytest

from keepstep import CheckpointPolicy
from keepstep.train.pace.frequency import Cost, space
from keepstep.train.pace.schedule import Due, LastSave, is_due

START = LastSave(step=0, at_s=0.0)


def due(
    policy: CheckpointPolicy,
    step: int,
    now_s: float,
    last: LastSave = START,
    *,
    busy: bool = False,
    cost: Cost | None = None,
) -> bool | None:
    """True, False, or None for a skip."""
    spacing = space(policy, cost, None)
    said = is_due(policy, spacing, step=step, now_s=now_s, last=last, busy=busy)
    return None if said is Due.SKIPPED else said is Due.YES


def test_nothing_is_due_twice_at_one_step() -> None:
    for policy in (CheckpointPolicy(), CheckpointPolicy(every_n_steps=1), CheckpointPolicy(every_s=0.1)):
        assert not due(policy, 5, 100.0, LastSave(step=5, at_s=0.0))
        assert not due(policy, 0, 100.0)


def test_steps_lie_on_a_grid_that_no_resume_shifts() -> None:
    policy = CheckpointPolicy(every_n_steps=10)
    assert [step for step in range(1, 31) if due(policy, step, 0.0, LastSave(step=step - 1, at_s=0.0))] == [
        10,
        20,
        30,
    ]
    assert due(policy, 20, 0.0, LastSave(step=13, at_s=0.0))
    assert due(policy, 23, 0.0, LastSave(step=13, at_s=0.0))


def test_steps_wait_for_a_save_under_way_and_time_does_not() -> None:
    assert due(CheckpointPolicy(every_n_steps=1), 2, 9.0, busy=True)
    assert due(CheckpointPolicy(every_s=1), 2, 9.0, busy=True) is None
    assert due(CheckpointPolicy(every_s=1), 2, 9.0)
    assert due(CheckpointPolicy(every_s=10), 2, 9.0) is False
    assert due(CheckpointPolicy(every_s=10, every_n_steps=2), 2, 9.0)


def test_the_policy_says_what_a_busy_writer_means() -> None:
    assert due(CheckpointPolicy(every_n_steps=1, when_busy="skip"), 2, 9.0, busy=True) is None
    assert due(CheckpointPolicy(every_s=1, when_busy="wait"), 2, 9.0, busy=True)
    assert due(CheckpointPolicy(every_n_steps=5, when_busy="wait"), 2, 9.0, busy=True) is False
    assert due(CheckpointPolicy(max_overhead=0.5), 2, 9.0, busy=True) is False, "cost alone decides: no skip"
    assert due(CheckpointPolicy(max_overhead=0.5, when_busy="wait"), 2, 9.0, busy=True)


def test_the_limit_holds_back_steps() -> None:
    policy = CheckpointPolicy(every_n_steps=1, max_overhead=0.5)
    last, cost = LastSave(step=1, at_s=10.0), Cost(blocked_s=3.0)
    assert due(policy, 2, 12.9, last, cost=cost) is False
    assert due(policy, 3, 13.1, last, cost=cost)


def test_youngs_interval_decides_and_a_limit_may_stretch_it() -> None:
    policy = CheckpointPolicy(mean_time_between_failures_s=5000.0)
    cost = Cost(blocked_s=0.5, waited_s=0.25, slowed_s=0.25)  # the root of 2 * 1 s * 5,000 s is 100 s
    assert due(policy, 1, 0.1), "what a save costs is not known before the first"
    assert due(policy, 2, 99.9, cost=cost) is False
    assert due(policy, 2, 100.1, cost=cost)
    limited = CheckpointPolicy(mean_time_between_failures_s=5000.0, max_overhead=0.001)
    assert due(limited, 2, 999.0, cost=cost) is False
    assert due(limited, 2, 1000.0, cost=cost)


@pytest.mark.parametrize("when_busy", [None, "skip"])
def test_what_was_put_off_comes_as_soon_as_the_writer_is_free(when_busy: None) -> None:
    policy = CheckpointPolicy(every_s=60, when_busy=when_busy)
    assert due(policy, 100, 61.0, busy=True) is None
    assert due(policy, 101, 62.0)
