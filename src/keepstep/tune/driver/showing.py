"""What people see while an experiment runs: its reporter is told, and messages reach somebody."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from keepstep.tune.driver.deciding import Decider
from keepstep.tune.executors.protocol import Executor
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.trial import ERROR, RUNNING, Trial
from keepstep.tune.reporting.base import Overview, ProgressReporter
from keepstep.tune.result import AUTOMATIC_FIELDS

__all__ = ["Showing"]

_log = logging.getLogger(__name__)


class Showing:
    """Shows how an experiment stands.

    Args:
        reporter: who shows it; None: nobody; messages are logged then.
        history: the trials.
        executor: what they run on.
        decider: who decides.
        metric: what counts, if that was said.
        mode: "min" or "max".
    """

    def __init__(
        self,
        reporter: ProgressReporter | None,
        *,
        history: History,
        executor: Executor,
        decider: Decider,
        metric: str | None,
        mode: Literal["min", "max"] | None,
    ) -> None:
        self._reporter = reporter
        self._to_close = reporter
        self._history = history
        self._executor = executor
        self._decider = decider
        self._metric = metric
        self._mode = mode
        self._messages: list[str] = []
        self._lacked = False
        self._ended_before = 0

    def say(self, message: str) -> None:
        """Tell people something, once."""
        if self._reporter is None:
            _log.warning("%s", message)
        else:
            self._messages.append(message)

    def ended(self, trial: Trial) -> None:
        """A trial ended well; that its last result lacks the metric that counts is said once."""
        name = self._metric
        if name is None or self._lacked or not trial.last_result or trial.metric(name) is not None:
            return
        self._lacked = True
        own = sorted(set(trial.last_result) - {*AUTOMATIC_FIELDS})
        self.say(
            f"{trial} ended without the metric {name!r} (TuneConfig.metric) in its last result, which has: "
            f"{', '.join(own) or 'nothing'}. Such trials are never the best"
        )

    def begin(self) -> None:
        """Show how it stands, so that reporters know what was there before."""
        self._ended_before = 0 if self._history.live else len(self._history.all)
        self.look()

    def end(self) -> None:
        """All is done: show it for the last time, and how failed trials run again."""
        if self._ended_before and self._ended_before == len(self._history.all):
            self.say(
                "nothing was left to run: all trials had ended before. For a new experiment, as after a "
                "change of the code, give another RunConfig.name"
            )
        failed = sum(trial.status == ERROR for trial in self._history.all)
        if failed:
            self.say(
                f"{failed:,} of {len(self._history.all):,} trials failed for good; a new start does not run "
                f"them again. Tuner.restore({self._history.path!r}, trainable, restart_errored=True).fit() "
                "does, from the beginning; resume_errored=True: from their last checkpoints"
            )
        self.look(done=True)

    def look(self, *, done: bool = False) -> None:
        """Show it, if it is time; `done`: for the last time."""
        for message in self._decider.messages():
            self.say(message)
        if self._reporter is None or not self._reporter.should_report(self._history.all, done):
            return
        said, self._messages = self._messages, []
        try:
            self._reporter.report(self._overview(said), done)
        except (OSError, ValueError) as error:
            if not _cannot_be_shown(error):
                raise
            self._reporter = None
            self.close()
            for message in [f"progress can't be shown any more, and the experiment goes on: {error}", *said]:
                self.say(message)

    def _overview(self, messages: Sequence[str]) -> Overview:
        used: Counter[str] = Counter()
        for trial in self._history.live.values():
            if trial.status == RUNNING:
                used.update(trial.resources)
        return Overview(
            name=self._history.made.name,
            path=self._history.path,
            trials=self._history.all,
            expected_trials=self._decider.searcher.total_samples,
            metric=self._metric,
            mode=self._mode,
            elapsed_s=self._history.elapsed_s(time.time()),
            used=dict(used),
            total=self._executor.total,
            scheduler=self._decider.scheduler.debug_string(),
            messages=tuple(messages),
        )

    def close(self) -> None:
        """Give the terminal back; where it takes nothing now, once more at the next call."""
        if self._to_close is None:
            return
        try:
            self._to_close.close()
        except (OSError, ValueError) as error:
            if not _cannot_be_shown(error):
                raise
        else:
            self._to_close = None


def _cannot_be_shown(error: OSError | ValueError) -> bool:
    """Whether the terminal, or the file, is to blame, and no mistake of a reporter."""
    return isinstance(error, OSError | UnicodeError) or "closed file" in str(error)
