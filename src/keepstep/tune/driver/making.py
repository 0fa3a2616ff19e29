"""New trials, from what the searcher suggests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.driver.deciding import Suggestion
from keepstep.tune.driver.plain import plain, shown
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import TrialMade
from keepstep.tune.experiment.trial import Resources, Trial
from keepstep.tune.search.tag import experiment_tag

__all__ = ["Maker", "Naming"]

_LONGEST_NAME: Final = 120
_LONGEST_GIVEN: Final = 240
"""So that what is put beside it for a moment may have a longer name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """What the user says of names.

    Attributes:
        name: of a trial, or None.
        dirname: of its directory, or None.
    """

    name: Callable[[Any], str] | None = None
    dirname: Callable[[Any], str] | None = None


class Maker:
    """Makes the records of new trials.

    Args:
        history: the trials so far.
        resources: what a trial needs: fixed, or a function of its configuration.
        naming: what the user says of names.
    """

    def __init__(
        self,
        history: History,
        *,
        resources: Resources | Callable[[dict[str, Any]], Resources],
        naming: Naming,
    ) -> None:
        self._history = history
        self._resources = resources
        self._naming = naming

    def next_id(self) -> str:
        """The id of the next trial."""
        return f"{self._history.made.id[:5]}_{len(self._history.trials):05d}"

    def record(self, trial_id: str, suggested: Suggestion, time: float) -> TrialMade:
        """What is written down of a new trial.

        Raises:
            UsageError: the resources, or a name, that the user's function gave can't be.
        """
        config, evaluated = suggested.config, suggested.evaluated
        number = len(self._history.trials)
        tag = experiment_tag(number, evaluated)
        dirname = _safe(f"{self._history.made.trainable}_{trial_id}_{tag}")[:_LONGEST_NAME]
        record = TrialMade(
            time=time,
            trial=trial_id,
            config=plain(config),
            evaluated=shown(evaluated),
            tag=tag,
            dirname=dirname,
            resources=self._needed(config),
        )
        return self._named(record, config)

    def _needed(self, config: dict[str, Any]) -> dict[str, float]:
        found = self._resources(config) if callable(self._resources) else self._resources
        return {name: float(amount) for name, amount in found.items() if amount}

    def _named(self, record: TrialMade, config: dict[str, Any]) -> TrialMade:
        if self._naming.name is None and self._naming.dirname is None:
            return record
        draft = Trial(
            trial_id=record.trial,
            number=len(self._history.trials),
            trainable_name=self._history.made.trainable,
            config=config,
            evaluated_params=dict(record.evaluated),
            experiment_tag=record.tag,
            dirname=record.dirname,
            path=f"{self._history.path}/{record.dirname}",
            resources=record.resources,
        )
        name = str(self._naming.name(draft)) if self._naming.name is not None else None
        dirname = record.dirname
        if self._naming.dirname is not None:
            dirname = str(self._naming.dirname(draft))
            taken = any(trial.dirname == dirname for trial in self._history.trials.values())
            too_long = len(dirname) > _LONGEST_GIVEN
            if not dirname or dirname != _safe(dirname) or dirname.startswith(".") or taken or too_long:
                raise UsageError(
                    f"trial_dirname_creator gave {dirname!r} for trial "
                    f"{record.trial}{', which another trial has' if taken else ''}; expected a name of its "
                    f"own for each trial, of at most {_LONGEST_GIVEN} letters, digits and ._+=,@-, that does "
                    "not begin with a dot"
                )
        return replace(record, name=name, dirname=dirname)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+=,@-]+", "_", name)
