"""Processes that are gone before they hear that they were to go on with another trial: none is lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tune.running import tuner

from keepstep import tune
from keepstep.tune.executors.inline import InlineExecutor
from keepstep.tune.executors.protocol import Event, Reported
from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import TrialFailed


class Reused(tune.Trainable):
    """Is done at once, and can become the next trial."""

    def setup(self, config: dict[str, Any]) -> None:
        self.x = config["x"]

    def step(self) -> dict[str, Any]:
        return {"x": self.x, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.x = new_config["x"]
        return True


class Dying(InlineExecutor):
    """The process of the first trial is killed just after it reported."""

    died = False

    def wait(self, timeout_s: float) -> Sequence[Event]:
        events = [*super().wait(timeout_s)]
        for event in events:
            if isinstance(event, Reported) and not self.died:
                self.died = True
                self.kill(event.run)
                return [*events, *super().wait(0)]
        return events


class Silent(InlineExecutor):
    """The first trial's report is on its way until the driver has lost patience and kills it."""

    late: Event | None = None
    was_late = killed = False

    def kill(self, run: str) -> None:
        super().kill(run)
        self.killed = True

    def wait(self, timeout_s: float) -> Sequence[Event]:
        if self.late is not None:
            time.sleep(0.01)
            arrived = [self.late] if self.killed else []
            self.late = None if self.killed else self.late
            return arrived
        events = [*super().wait(timeout_s)]
        if not self.was_late and isinstance(events[-1], Reported):
            self.was_late, self.late = True, events.pop()
        return events


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("executor", "max_silence_s"), [(Dying, None), (Silent, 2.0)])
def test_a_trial_that_was_to_follow_in_a_process_that_is_gone_runs(
    tmp_path: Path, executor: type[InlineExecutor], max_silence_s: float | None
) -> None:
    found = tuner(
        tmp_path,
        Reused,
        {"x": tune.grid_search([1, 2, 3])},
        tune.TuneConfig(reuse_actors=True, max_concurrent_trials=1),
        executor=executor,
        failure_config=tune.FailureConfig(max_silence_s=max_silence_s),
    ).fit()
    assert [result.metrics["x"] for result in found] == [1, 2, 3]
    assert not [record for record in read_journal(tmp_path / "it") if isinstance(record, TrialFailed)]
