"""Costs are learnt from times alone, so these tests play whole runs with a made-up clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from keepstep import CheckpointPolicy
from keepstep.train.pace.frequency import Cost, CostMeter, space, young_interval_s
from keepstep.train.pace.schedule import Due, LastSave, is_due


@dataclass
class Played:
    """A training loop by the clock: steps of some length, saves that block, make wait, and slow down."""

    policy: CheckpointPolicy
    step_s: float = 0.1
    blocked_s: float = 0.02
    waited_s: float = 0.01
    writing_s: float = 0.0
    slower: float = 1.0
    noise: float = 0.0
    evaluates_every: int = 0
    meter: CostMeter = field(default_factory=CostMeter)
    now_s: float = 0.0
    spent_s: float = 0.0
    saves: int = 0

    def run(self, steps: int) -> None:
        dice = random.Random(7)
        last, busy_until_s, first = LastSave(step=0, at_s=0.0), 0.0, False
        for step in range(1, steps + 1):
            busy = self.now_s < busy_until_s
            usual_s = self.step_s * (1 + self.noise * dice.random())
            if self.evaluates_every and step % self.evaluates_every == 0:
                usual_s += 50 * self.step_s
            waited_s = self.waited_s if busy and first else 0.0
            extra_s = waited_s + (self.step_s * (self.slower - 1) if busy else 0.0)
            first = False
            self.now_s += usual_s + extra_s
            self.spent_s += extra_s
            self.meter.step(usual_s + extra_s, waited_s=waited_s, busy=busy)
            spacing = space(self.policy, self.meter.cost(), self.meter.step_s)
            is_busy = self.now_s < busy_until_s
            if is_due(self.policy, spacing, step=step, now_s=self.now_s, last=last, busy=is_busy) is Due.YES:
                self.now_s += self.blocked_s
                self.spent_s += self.blocked_s
                self.meter.save(self.blocked_s)
                last, first = LastSave(step=step, at_s=self.now_s), True
                busy_until_s = self.now_s + self.writing_s
                self.saves += 1


def cost_of(meter: CostMeter) -> Cost:
    cost = meter.cost()
    assert cost is not None
    return cost


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"writing_s": 0.35, "slower": 1.5},
        {"writing_s": 3.0, "slower": 1.5},
        {"writing_s": 3.0, "slower": 1.5, "noise": 0.5},
        {"writing_s": 3.0, "slower": 1.5, "noise": 0.2, "evaluates_every": 20},
        {"blocked_s": 0.3, "waited_s": 0.5, "writing_s": 0.05},
    ],
)
def test_at_most_the_given_share_goes_to_saves(share: float, how: dict[str, float]) -> None:
    played = Played(CheckpointPolicy(max_overhead=share), **how)  # type: ignore[arg-type]
    played.run(25_000)
    assert played.saves > 5
    assert 0.5 * share < played.spent_s / played.now_s < 1.1 * share


def test_the_parts_of_the_cost_are_found() -> None:
    played = Played(CheckpointPolicy(every_n_steps=50), writing_s=1.0, slower=1.4, noise=0.1)
    played.run(2000)
    cost = cost_of(played.meter)
    assert cost.blocked_s == pytest.approx(0.02)
    assert cost.waited_s == pytest.approx(0.01)
    assert cost.slowed_s == pytest.approx(0.04 * 7, rel=0.2)  # steps of 0.145 s in a second
    assert not cost.is_bound
    assert played.meter.step_s == pytest.approx(0.105, rel=0.05)


def test_a_save_that_slows_nothing_costs_nothing_in_the_background() -> None:
    played = Played(CheckpointPolicy(every_n_steps=50), writing_s=2.0, evaluates_every=10)
    played.run(1000)
    assert cost_of(played.meter).slowed_s == pytest.approx(0.0, abs=1e-9)


def test_without_steps_to_compare_with_the_cost_is_a_bound() -> None:
    played = Played(CheckpointPolicy(every_n_steps=1), writing_s=0.05, slower=1.2)
    played.run(30)
    assert cost_of(played.meter).is_bound
    assert played.meter.step_s is None
    assert space(played.policy, played.meter.cost(), None).to_json()["cost"]["slowed_s"] is None


def test_a_run_that_changes_its_pace_is_learnt_anew() -> None:
    played = Played(CheckpointPolicy(max_overhead=0.01), blocked_s=0.5)
    played.run(20_000)
    before = cost_of(played.meter).total_s
    played.blocked_s = 0.05
    played.run(20_000)
    assert cost_of(played.meter).total_s < 0.3 * before


def test_nothing_is_known_before_the_first_save() -> None:
    meter = CostMeter()
    assert meter.cost() is None
    meter.step(0.1, busy=False)
    assert meter.step_s is None
    spacing = space(CheckpointPolicy(), meter.cost(), meter.step_s)
    assert (spacing.least_s, spacing.wanted_s, spacing.interval_s) == (0.0, 0.0, None)
    assert "not known yet" in str(spacing)


def test_youngs_interval() -> None:
    assert young_interval_s(50.0, 10_000.0) == 1000.0
    played = Played(CheckpointPolicy(mean_time_between_failures_s=3600.0), blocked_s=0.5, waited_s=0.0)
    played.run(10_000)
    assert played.now_s / played.saves == pytest.approx(60.0, rel=0.05)


def test_a_spacing_says_its_rule_and_numbers() -> None:
    cost = Cost(blocked_s=0.02, waited_s=0.01, slowed_s=0.07)
    spacing = space(CheckpointPolicy(max_overhead=0.01), cost, 0.5)
    assert spacing.to_json() == {
        "rule": "max_overhead=0.01",
        "cost": {"blocked_s": 0.02, "waited_s": 0.01, "slowed_s": 0.07},
        "interval_s": 9.98,
        "interval_steps": 20,
    }
    assert str(spacing) == (
        "max_overhead=0.01: one save every 9.98 s, about 20 steps; a save costs 0.1 s (0.02 s blocked, "
        "0.01 s waited for the copy, 0.07 s in slower steps)"
    )
    by_steps = space(CheckpointPolicy(every_n_steps=100), cost, 0.5)
    assert (by_steps.interval_s, by_steps.interval_steps) == (50.0, 100)
    both = space(CheckpointPolicy(every_n_steps=100, every_s=20, max_overhead=0.001), cost, 0.5)
    assert both.rule == "every_n_steps=100, every_s=20, max_overhead=0.001"
    assert both.interval_s == pytest.approx(99.98)


def test_only_what_changed_much_is_news() -> None:
    policy = CheckpointPolicy(max_overhead=0.01)
    first, near, far = (space(policy, Cost(blocked_s=cost), 0.5) for cost in (0.10, 0.11, 0.2))
    unknown = space(policy, None, None)
    assert first.differs_from(None)
    assert first.differs_from(unknown)
    assert not unknown.differs_from(unknown)
    assert not near.differs_from(first)
    assert far.differs_from(first)


def test_an_interval_in_steps_is_known_before_any_time_is() -> None:
    assert space(CheckpointPolicy(every_n_steps=7), None, None).interval_steps == 7
    assert space(CheckpointPolicy(every_n_steps=7, max_overhead=0.1), None, None).interval_steps is None
    assert space(CheckpointPolicy(every_n_steps=7, every_s=1), None, None).interval_steps is None
