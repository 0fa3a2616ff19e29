"""Who shows how an experiment goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from keepstep.tune.executors.protocol import Resources
from keepstep.tune.experiment.trial import Trial

__all__ = ["Overview", "ProgressReporter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview(Sequence[Trial]):
    """How an experiment stands: a sequence of its trials, with what else there is to tell.

    Attributes:
        name: of the experiment.
        path: the address of its directory.
        trials: all of them.
        expected_trials: how many there will be, if that is known.
        metric: what counts, if that was said.
        mode: "min" or "max".
        elapsed_s: since it began, time between restarts not counted.
        used: what running trials hold.
        total: what there is.
        scheduler: in one line.
        messages: what was said since the last look, for people: a failure, a skipped option.
    """

    name: str
    path: str
    trials: Sequence[Trial]
    expected_trials: int | None
    metric: str | None
    mode: Literal["min", "max"] | None
    elapsed_s: float
    used: Resources
    total: Resources
    scheduler: str
    messages: Sequence[str] = ()

    @overload
    def __getitem__(self, i: int) -> Trial: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Trial]: ...
    def __getitem__(self, i: int | slice) -> Trial | Sequence[Trial]:
        return self.trials[i]

    def __len__(self) -> int:
        return len(self.trials)


class ProgressReporter:
    """Base class."""

    def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
        """Whether it is time; asked after everything that happens and twice a second."""
        raise NotImplementedError

    def report(self, overview: Overview, done: bool) -> None:
        """Show it; `done`: for the last time. An override may call it `trials`, which it is a sequence of."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the terminal back; called whatever happened, and again at the end if it raises OSError."""
