"""Which configurations a trial of Population Based Training had, one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.experiment.journal import JOURNAL_NAME, read_journal
from keepstep.tune.experiment.records import (
    CheckpointSaved,
    Record,
    ResultReported,
    TrialEnded,
    TrialFailed,
    TrialMade,
)

__all__ = ["Change", "Policy", "read_policy"]

_PREFIX: Final = "pbt_policy_"
_SUFFIX: Final = ".txt"
_COLUMNS: Final = 6


@dataclass(frozen=True)
class Change:
    """A configuration, and the `training_iteration` after which it counts."""

    iteration: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """The configuration that training began with, and what it was changed to."""

    config: Mapping[str, Any]
    changes: tuple[Change, ...]


def read_policy(path: Path) -> Policy:
    """What led to a trial's last state.

    Args:
        path: a trial's directory in an experiment of keepstep; or a file `pbt_policy_<trial id>.txt` that Ray
            Tune wrote; or one of that name in an experiment of keepstep, where it need not be: the journal
            says the same.

    Raises:
        UsageError: there is nothing of the kind.
        JournalError: the journal is damaged.
    """
    if path.is_file():
        return _from_file(path)
    if (path.parent / JOURNAL_NAME).is_file():
        name = path.name
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            name = name[len(_PREFIX) : -len(_SUFFIX)]
        return _from_journal(path.parent, name)
    raise UsageError(
        f"{path} is no policy of Population Based Training; expected the directory of a trial in "
        f"an experiment of keepstep, or a file {_PREFIX}<trial id>{_SUFFIX} of Ray Tune"
    )


def _from_file(path: Path) -> Policy:
    """Rows, oldest first: [trial, source, its step, source's step, source's configuration, new one]."""
    rows: list[Any] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, list) or len(row) != _COLUMNS or not all(isinstance(r, dict) for r in row[4:]):
            raise UsageError(
                f"line {number} of {path} is {line!r:.100}; expected a JSON list of {_COLUMNS}: two trials, "
                "two steps and two configurations, as Ray Tune writes them"
            )
        rows.append(row)
    if not rows:
        raise UsageError(
            f"{path} is empty: that trial never changed its configuration; there is nothing to replay"
        )
    changes: list[Change] = []
    config: Mapping[str, Any] = {}
    follows = rows[-1][0]
    for trial, source, _, step, old, new in reversed(rows):
        if trial != follows:
            break  # What came before was overwritten by a later change.
        changes.append(Change(int(step), new))
        config, follows = old, source
    return Policy(config, tuple(reversed(changes)))


class _Lineages:
    """What led to each trial's state, and to each checkpoint's, while a journal is read."""

    def __init__(self) -> None:
        self.now: dict[str, Policy] = {}
        self.dirnames: dict[str, str] = {}
        self._then: dict[tuple[str, str], tuple[int, Policy]] = {}

    def follow(self, record: Record) -> None:
        if isinstance(record, TrialMade):
            self.dirnames[record.dirname] = record.trial
            if record.config is not None:
                self.now[record.trial] = Policy(record.config, ())
        made = record.checkpoint if isinstance(record, ResultReported | CheckpointSaved) else None
        if isinstance(record, ResultReported | CheckpointSaved) and made and record.trial in self.now:
            self._then[record.trial, made] = (record.iteration, self.now[record.trial])
        if isinstance(record, ResultReported | TrialFailed | TrialEnded):
            for act in record.acts:
                if act.do == "exploit":
                    self._exploited(act.trial, (act.source or "", act.checkpoint or ""), act.config)

    def _exploited(self, trial: str, source: tuple[str, str], config: Mapping[str, Any] | None) -> None:
        found = self._then.get(source)
        if found is None or config is None:
            self.now.pop(trial, None)
            return
        iteration, policy = found
        self.now[trial] = Policy(policy.config, (*policy.changes, Change(iteration, config)))


def _from_journal(directory: Path, name: str) -> Policy:
    lineages = _Lineages()
    for record in read_journal(directory):
        lineages.follow(record)
    trial = lineages.dirnames.get(name, name)
    if trial in lineages.now:
        return lineages.now[trial]
    if trial in lineages.dirnames.values():
        raise UsageError(
            f"the configurations of {trial} hold what JSON does not, so the journal in {directory} lacks "
            "them; they can't be replayed"
        )
    raise UsageError(
        f"the experiment in {directory} has no trial {name!r}; it has: {', '.join(lineages.dirnames)}"
    )
