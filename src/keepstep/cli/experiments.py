"""Experiments of `keepstep.tune` as their journals tell of them: found, read, one trial chosen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from keepstep.cli.metrics import Metric, choose_metric, direction_of
from keepstep.errors import ExperimentNotFoundError, KeepstepError, UsageError
from keepstep.tune.assembly.spec import newest_spec
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import JOURNAL_NAME
from keepstep.tune.experiment.reading import read_experiment
from keepstep.tune.experiment.records import Record, ResultReported, TrialAgain
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.encoding import row_of
from keepstep.tune.ranking import best_trial, number, score
from keepstep.tune.result import AUTOMATIC_FIELDS

__all__ = ["Experiment", "experiments_below", "find_trial", "is_experiment", "open_experiment"]

_NAMES_IN_MESSAGE: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What a journal says.

    Attributes:
        history: its trials.
        records: all of it.
        spec: what it was told last.
        updated_s: when its last record was written, in seconds since 1970.
    """

    history: History
    records: Sequence[Record]
    spec: Mapping[str, Any]
    updated_s: float

    @property
    def name(self) -> str:
        return self.history.made.name

    @property
    def trials(self) -> list[Trial]:
        """In the order in which they were made."""
        return list(self.history.trials.values())

    @property
    def counts(self) -> dict[str, int]:
        """{status: how many trials}."""
        return dict(Counter(trial.status for trial in self.trials))

    @property
    def state(self) -> str:
        """Whether it goes on: "ended: all", or "open" while it runs and after a kill."""
        return f"ended: {self.history.ended}" if self.history.ended is not None else "open"

    @property
    def metric_names(self) -> list[str]:
        """Metrics that trials report, the experiment's own first."""
        names: dict[str, None] = {}
        own = self.spec.get("metric")
        for trial in self.trials:
            for name, found in row_of(trial.last_result).items():
                if name not in AUTOMATIC_FIELDS and number(found) is not None:
                    names.setdefault(name)
        return [own, *(name for name in names if name != own)] if own in names else list(names)

    def metric(self, said: str | None) -> Metric | None:
        """What trials are compared by: NAME, NAME:min or NAME:max; by default the experiment's own.

        Raises:
            UsageError: no trial reports it.
        """
        own, mode = self.spec.get("metric"), self.spec.get("mode")
        if said is None:
            if own is None:
                return None
            return Metric(name=own, direction=mode if mode is not None else direction_of(own))
        found = choose_metric(said, self.metric_names, of="trial")
        same = found.name == own and said == found.name and mode is not None
        return Metric(name=found.name, direction=mode) if same else found

    def results_of(self, trial: Trial) -> list[dict[str, Any]]:
        """All results of a trial that count, oldest first."""
        history = History(self.history.made, self.history.path)
        found: list[dict[str, Any]] = []
        for record in self.records[1:]:
            history.apply(record)
            if isinstance(record, ResultReported) and record.trial == trial.trial_id:
                found.append(dict(history.trial(trial.trial_id).last_result))
            elif isinstance(record, TrialAgain) and record.trial == trial.trial_id and record.anew:
                found.clear()
        return found

    def all_results(self) -> dict[str, list[Mapping[str, Any]]]:
        """What every trial reported, by its id."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for record in self.records:
            if isinstance(record, ResultReported):
                found.setdefault(record.trial, []).append(
                    {**record.metrics, "training_iteration": record.iteration}
                )
            elif isinstance(record, TrialAgain) and record.anew:
                found.pop(record.trial, None)
        return found

    def best(
        self, name: str, direction: Literal["min", "max"], scope: str = "last"
    ) -> tuple[Trial, float] | None:
        """The best trial and its value; None: none has such a number."""
        results = self.all_results() if scope != "last" else {}

        def of(trial: Trial) -> Sequence[Mapping[str, Any]]:
            return results.get(trial.trial_id, ())

        found = best_trial(self.trials, name, direction, scope, of, only_finite=True)
        if found is None:
            return None
        value = score(found, name, direction, scope, of)
        return (found, value) if value is not None else None


def is_experiment(place: Path | str) -> bool:
    """Whether there is a journal."""
    return not isinstance(place, str) and (place / JOURNAL_NAME).is_file()


def open_experiment(place: Path | str) -> Experiment:
    """Read an experiment; nothing is changed.

    Raises:
        ExperimentNotFoundError: there is none.
        JournalError: its journal is damaged.
    """
    address = place if isinstance(place, str) else str(place.resolve())
    records = read_experiment(address)
    if not records:
        raise ExperimentNotFoundError(f"{address} holds an experiment that was never begun")
    return Experiment(
        history=History.of(records, address),
        records=records,
        spec=newest_spec(records),
        updated_s=records[-1].time,
    )


def experiments_below(root: Path) -> list[tuple[Path, Experiment | KeepstepError]]:
    """Experiments in a directory of them, by name; one that can't be read with the reason.

    Raises:
        ExperimentNotFoundError: there is none.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        raise ExperimentNotFoundError(
            f"there is nothing at {root}; give an experiment or a directory of experiments"
        ) from None
    except NotADirectoryError:
        raise ExperimentNotFoundError(
            f"{root} is a file; give an experiment or a directory of experiments"
        ) from None
    found: list[tuple[Path, Experiment | KeepstepError]] = []
    for place in (root / name for name in names):
        if is_experiment(place):
            try:
                found.append((place, open_experiment(place)))
            except KeepstepError as error:
                found.append((place, error))
    if not found:
        raise ExperimentNotFoundError(
            f"there is no experiment in {root}; an experiment is a directory with {JOURNAL_NAME}: "
            "<storage_path>/<name>"
        )
    return found


def find_trial(place: Path | str, said: str | None) -> tuple[Experiment, Trial]:
    """One trial: PATH is its directory, or the experiment's and `said` tells which.

    Args:
        place: of the trial or the experiment.
        said: id, number, name or directory.

    Raises:
        ExperimentNotFoundError: there is none.
        UsageError: it is not said which.
    """
    if said is None and not isinstance(place, str) and not is_experiment(place):
        place = place.resolve()
        place, said = place.parent, place.name
    experiment = open_experiment(place)
    trials = experiment.trials
    if said is None:
        raise UsageError(f"{place} is an experiment of {len(trials)} trials; name one: {_some(trials)}")
    for trial in trials:
        if said in (trial.trial_id, str(trial.number), str(trial), trial.dirname):
            return experiment, trial
    raise ExperimentNotFoundError(f"{experiment.history.path} has no trial {said!r}; it has {_some(trials)}")


def _some(trials: Sequence[Trial]) -> str:
    shown = ", ".join(map(str, trials[:_NAMES_IN_MESSAGE])) or "none"
    more = len(trials) - _NAMES_IN_MESSAGE
    return f"{shown} and {more:,} more" if more > 0 else shown
