"""Whatever happens to trials: every one ends, no slot is idle for nothing, and a restart decides alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tune.schedulers.simulator import Simulation, World

from keepstep.tune.experiment.trial import PAUSED, PENDING
from keepstep.tune.schedulers.async_hyperband import AsyncHyperBandScheduler
from keepstep.tune.schedulers.base import FIFOScheduler, TrialScheduler
from keepstep.tune.schedulers.hyperband import HyperBandScheduler
from keepstep.tune.schedulers.median_stopping_rule import MedianStoppingRule
from keepstep.tune.schedulers.pb2 import PB2
from keepstep.tune.schedulers.pbt import PopulationBasedTraining

TIME = "training_iteration"


def population(**settings: Any) -> PopulationBasedTraining:
    mutations = {"quality": [0.1, 0.2, 0.4, 0.8], "other": {"deep": lambda: 0.5}}
    return PopulationBasedTraining(TIME, hyperparam_mutations=mutations, **settings)


SCHEDULERS: dict[str, Callable[[], TrialScheduler]] = {
    "fifo": FIFOScheduler,
    "asha": lambda: AsyncHyperBandScheduler(TIME, max_t=9, reduction_factor=2, brackets=3),
    "asha, running on": lambda: AsyncHyperBandScheduler(TIME, max_t=5, stop_last_trials=False),
    "hyperband": lambda: HyperBandScheduler(TIME, max_t=9, reduction_factor=3),
    "hyperband by 2": lambda: HyperBandScheduler(TIME, max_t=11, reduction_factor=2),
    "hyperband, running on": lambda: HyperBandScheduler(TIME, max_t=7, stop_last_trials=False),
    "median": lambda: MedianStoppingRule(TIME, grace_period=2, min_samples_required=2),
    "median, soft": lambda: MedianStoppingRule(TIME, grace_period=2, hard_stop=False, min_time_slice=2),
    "pbt": lambda: population(perturbation_interval=3),
    "pbt, often": lambda: population(perturbation_interval=1, quantile_fraction=0.5),
    "pb2": lambda: PB2(TIME, perturbation_interval=2, hyperparam_bounds={"quality": [0, 1]}),
    "pbt, in step": lambda: population(perturbation_interval=3, synch=True),
    "pbt, in step, late": lambda: population(perturbation_interval=2, synch=True, burn_in_period=5),
}
WAITS = ("hyperband", "pbt, in step")
"""What may leave a slot empty while another trial runs, since it waits for that one."""

worlds = st.builds(
    World,
    slots=st.integers(1, 5),
    end=st.integers(1, 13),
    seed=st.integers(0, 2**32),
    classes=st.booleans(),
    every=st.sampled_from([0, 1, 2, 5]),
    fails=st.sampled_from([0.0, 0.05, 0.2]),
    final=st.sampled_from([0.0, 0.5, 1.0]),
    kills=st.sampled_from([0.0, 0.02]),
    revivals=st.sampled_from([0.0, 0.02]),
    pending=st.sampled_from([None, 1]),
)


@pytest.mark.parametrize("name", SCHEDULERS)
@settings(max_examples=15, deadline=None)
@given(world=worlds, count=st.integers(1, 13))
def test_every_trial_ends_and_no_slot_is_idle_for_nothing(name: str, world: World, count: int) -> None:
    waits = name.startswith(WAITS)

    def check(now: Simulation) -> None:
        assert len(now.runs) <= world.slots
        waiting = [trial for trial in now.trials if trial.status in (PENDING, PAUSED)]
        ending = any(run.over for run in now.runs.values())
        if waiting and len(now.runs) < world.slots and not ending:
            assert waits, f"{waiting} could run"
            assert now.runs, f"{waiting} are stranded"

    configs = [{"quality": (7 * number % count) / count} for number in range(count)]
    done = Simulation(SCHEDULERS[name], configs, world, check=check).run()
    assert len(done.trials) == count
    assert all(trial.is_finished() for trial in done.trials)
    done.kill()
