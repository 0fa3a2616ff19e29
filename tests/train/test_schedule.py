from __future__ import annotations

import pytest

from keepstep import CheckpointPolicy
from keepstep.train.schedule import LastSave, is_due

START = LastSave(step=0, at_s=0.0)


def due(
    policy: CheckpointPolicy, step: int, now_s: float, last: LastSave = START, busy: bool = False
) -> bool:
    return is_due(policy, step=step, now_s=now_s, last=last, busy=busy)


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
    assert not due(CheckpointPolicy(every_s=1), 2, 9.0, busy=True)
    assert due(CheckpointPolicy(every_s=1), 2, 9.0)
    assert not due(CheckpointPolicy(every_s=10), 2, 9.0)
    assert due(CheckpointPolicy(every_s=10, every_n_steps=2), 2, 9.0)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_overhead_stays_below_its_limit(share: float) -> None:
    policy = CheckpointPolicy(max_overhead=share)
    now, blocked, last, step = 0.0, 0.0, START, 0
    while step < 5000:
        now += 0.01
        step += 1
        if due(policy, step, now, last):
            cost = 0.02 + 0.01 * (step % 3)
            now, blocked = now + cost, blocked + cost
            last = LastSave(step=step, at_s=now, blocked_s=cost)
    assert 0 < blocked / now < share * 1.2


def test_the_limit_holds_back_steps() -> None:
    policy = CheckpointPolicy(every_n_steps=1, max_overhead=0.5)
    last = LastSave(step=1, at_s=10.0, blocked_s=3.0)
    assert not due(policy, 2, 12.9, last)
    assert due(policy, 3, 13.1, last)
