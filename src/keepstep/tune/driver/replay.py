"""A journal read again: everybody who decides is told everything once more, and must decide as he did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keepstep.errors import TuneError
from keepstep.tune.driver.deciding import Decider, Suggestion
from keepstep.tune.driver.plain import plain, same
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import (
    Act,
    Record,
    ResultReported,
    TrialAgain,
    TrialEnded,
    TrialFailed,
    TrialMade,
)
from keepstep.tune.experiment.trial import Trial

__all__ = ["replay"]

_log = logging.getLogger(__name__)


def replay(records: Sequence[Record], history: History, decider: Decider) -> None:
    """Bring a history, and all who decide, to where they stood when the last record was written.

    Args:
        records: of the journal, without the first.
        history: of the first record alone.
        decider: new ones, made of the same arguments.

    Raises:
        TuneError: one of them decides otherwise than he did.
        JournalError: the records contradict each other.
    """
    again = _Replay(history, decider)
    for record in records:
        found = again.steps.get(type(record))
        if found is not None:
            found(record)
        else:
            history.apply(record)
    again.tell_of_the_rest()


class _Replay:
    def __init__(self, history: History, decider: Decider) -> None:
        self._history = history
        self._decider = decider
        self._differing = 0
        self.steps: Mapping[type, Callable[[Any], None]] = {
            TrialMade: self._made,
            ResultReported: self._resulted,
            TrialFailed: self._failed,
            TrialEnded: self._ended,
            TrialAgain: self._again,
        }

    def _made(self, record: TrialMade) -> None:
        suggested = self._decider.suggest(record.trial, len(self._history.trials))
        config = self._agreed(record, suggested)
        self._history.apply(record)
        trial = self._history.trial(record.trial)
        trial.config = config
        self._decider.added(trial)

    def _agreed(self, record: TrialMade, suggested: Suggestion | str | None) -> dict[str, Any]:
        """The suggestion itself, which may hold what JSON doesn't; else what was written down."""
        found = suggested.config if isinstance(suggested, Suggestion) else None
        if found is not None and (record.config is None or same(plain(found), dict(record.config))):
            return found
        shown = "nothing" if found is None else f"{found!r:.300}"
        if record.config is None:
            raise TuneError(
                f"trial {record.trial} has a configuration that JSON does not hold, and the search does not "
                f"suggest it again, but {shown}. Give the same param_space and search_alg that the "
                "experiment was started with"
            )
        self._differing += 1
        if self._differing > 1:
            return dict(record.config)
        _log.warning(
            "the search suggests %s for trial %s, where it once suggested %s: was its code or the "
            "param_space changed? What was written down counts",
            shown,
            record.trial,
            dict(record.config),
        )
        return dict(record.config)

    def tell_of_the_rest(self) -> None:
        """Of suggestions that differ the first was told in full."""
        if self._differing > 1:
            _log.warning("so it is with %s more trials", f"{self._differing - 1:,}")

    def _resulted(self, record: ResultReported) -> None:
        self._history.reported(record)
        trial = self._history.trial(record.trial)
        verdict = self._decider.resulted(trial, trial.last_result, done=record.why == "done")
        self._compare(trial, (record.decision, record.acts), (verdict.decision, verdict.acts))
        self._history.decided(record, acted=True)

    def _failed(self, record: TrialFailed) -> None:
        self._history.failed(record, acted=True)
        if record.final:
            trial = self._history.trial(record.trial)
            self._compare(trial, ("", record.acts), ("", self._decider.failed(trial)))

    def _ended(self, record: TrialEnded) -> None:
        trial = self._history.trial(record.trial)
        again = trial.ends_at is not None
        self._history.completed(record, acted=True)
        self._compare(trial, ("", record.acts), ("", self._decider.completed(trial, again=again)))

    def _again(self, record: TrialAgain) -> None:
        self._history.apply(record)
        self._decider.again(self._history.trial(record.trial))

    def _compare(self, trial: Trial, was: tuple[str, Sequence[Act]], now: tuple[str, Sequence[Act]]) -> None:
        if was[0] != now[0] or not _same_acts(was[1], now[1]):
            raise TuneError(
                f"{type(self._decider.scheduler).__name__} and the stopper decide otherwise than they did "
                f"when {trial} reported iteration {trial.iteration}: {_told(*now)}, but the journal has "
                f"{_told(*was)}. Give the scheduler and the stopper that the experiment was started with; "
                "they must not depend on anything but what they are told"
            )


def _same_acts(was: Sequence[Act], now: Sequence[Act]) -> bool:
    return len(was) == len(now) and all(
        (a.do, a.trial, a.source, a.checkpoint) == (b.do, b.trial, b.source, b.checkpoint)
        and (a.config is None or same(dict(a.config), plain(b.config)))
        for a, b in zip(was, now, strict=True)
    )


def _told(decision: str, acts: Sequence[Act]) -> str:
    return ", ".join(filter(None, [decision, *(f"{act.do} {act.trial}" for act in acts)])) or "nothing"
