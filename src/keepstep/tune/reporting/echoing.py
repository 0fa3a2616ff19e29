"""What trials print, shown by the driver: as a callback, so that it follows them from start to end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from keepstep.tune.callback import Callback
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.reporting.echo import Echo

__all__ = ["EchoCallback"]

_LAST_WORDS_S: Final = 1.0
"""How long a process may still print after its trial's end was decided."""


class EchoCallback(Callback):
    """Shows what trials print.

    Args:
        names: of the files in a trial's directory that hold it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._echo = Echo()
        self._running: dict[str, Trial] = {}
        self._ending: deque[tuple[float, Trial]] = deque()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._echo.start(trial, [Path(trial.path, name) for name in self._names])
        self._running[trial.trial_id] = trial

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._echo.turn(self._running.values())
        while self._ending and self._ending[0][0] < time.monotonic() - _LAST_WORDS_S:
            self._end(self._ending.popleft()[1])

    def _end(self, trial: Trial) -> None:
        self._running.pop(trial.trial_id, None)
        self._echo.end(trial)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ending.append((time.monotonic(), trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ending.append((time.monotonic(), trial))

    def on_experiment_end(self, trials: Sequence[Trial], **info: Any) -> None:
        for trial in list(self._running.values()):
            self._end(trial)
