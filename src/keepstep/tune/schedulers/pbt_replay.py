"""One trial goes through the configurations that Population Based Training found, one after the other."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from keepstep.errors import UsageError
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.schedulers.base import Controller, Decision, TrialScheduler
from keepstep.tune.schedulers.policy import read_policy

__all__ = ["PopulationBasedTrainingReplay"]


class PopulationBasedTrainingReplay(TrialScheduler):
    """Trains one trial with the schedule of configurations that led to another one.

    Its own configuration is that with which the schedule begins, whatever `param_space` says.

    Args:
        policy_file: the directory of a trial in an experiment of keepstep; or a file
            `pbt_policy_<trial id>.txt` of Ray Tune. (By that name in an experiment's directory a trial of
            keepstep is found, too: its journal takes the place of the file.)

    Raises:
        UsageError: there is nothing of the kind.
        JournalError: the journal is damaged.
    """

    def __init__(self, policy_file: str | os.PathLike[str]) -> None:
        self.policy_file = str(policy_file)
        policy = read_policy(Path(policy_file).expanduser())
        self.config = dict(policy.config)
        self._changes = list(policy.changes)
        self._num_changed = 0
        self._saves_when_asked = True
        self._said = False

    def describe(self) -> dict[str, Any]:
        return {"policy_file": self.policy_file}

    def anew(self) -> PopulationBasedTrainingReplay:
        return type(self)(**self.describe())

    def set_search_properties(
        self, metric: str | None, mode: Literal["min", "max"] | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        self._saves_when_asked = bool(spec.get("saves_when_asked", True))
        return super().set_search_properties(metric, mode, config, **spec)

    def complete_config(self, number: int, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if number > 0:
            raise UsageError(
                "PopulationBasedTrainingReplay trains one trial, and a second one was asked for: set "
                "TuneConfig(num_samples=1), without a grid in param_space"
            )
        return copy.deepcopy(self.config), {}

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        due = [change for change in self._changes if change.iteration <= trial.training_iteration]
        if not due:
            return "CONTINUE"
        newest = trial.resume_from
        if newest is None or newest.iteration < due[-1].iteration:
            self._ask_for_checkpoint(tune_controller, trial, due[-1].iteration)
            return "CONTINUE"
        del self._changes[: len(due)]
        self._num_changed += len(due)
        config = copy.deepcopy(dict(due[-1].config))
        self.messages.append(f"{trial} goes on at iteration {newest.iteration} with {config!r:.500}")
        tune_controller.exploit(trial, newest, config, {})
        return "NOOP"

    def _ask_for_checkpoint(self, tune_controller: Controller, trial: Trial, iteration: int) -> None:
        if self._saves_when_asked:
            tune_controller.save_trial(trial)
        elif not self._said:
            self._said = True
            self.messages.append(
                f"{trial} is to change its configuration at iteration {iteration}, and does so as soon as it "
                "reports a checkpoint: tune.report(metrics, checkpoint=...)"
            )

    def debug_string(self) -> str:
        return f"{type(self).__name__}: {self._num_changed} changes made, {len(self._changes)} to come"
