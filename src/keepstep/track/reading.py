"""Reading a run's log: one clean curve, whatever died while it was written. No torch, nothing but the file.

Every row knows the row before it. A line that says that a run was resumed from a checkpoint goes back to the
row that was the last one when the checkpoint was saved; the rows between belong to an attempt that died,
and no row that counts leads to them.
"""

from __future__ import annotations

import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepstep.errors import UsageError
from keepstep.track.runlog import LOG_NAME
from keepstep.track.values import from_json

__all__ = ["Log", "Row", "read_log"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one call of `accelerator.log()` left.

    Attributes:
        step: as given; without one, the step after the largest so far.
        time: when it was logged, seconds since 1970.
        run: id of the run, kept over restarts; that of its checkpoints.
        attempt: 1 for the first process of the run, 2 after the first resume ...
        values: by name.
        left_out: {name: kind of value} of what a log can't hold, an image say.
    """

    step: int
    time: float
    run: str
    attempt: int
    values: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Log:
    """A log as it counts: iterate over it, or take `rows`.

    Attributes:
        rows: of one run, in the order they were logged, without those that a resume rewound.
        run: which run that is; None in an empty log.
        project: the name that `init_trackers()` was given last; None without one.
        config: the configuration that it was given last; None if it was not called.
        runs: every run in the file, in the order they first logged something.
        damaged_lines: how many lines could not be read; the last one of a process that was killed, say.
    """

    rows: tuple[Row, ...]
    run: str | None = None
    project: str | None = None
    config: Mapping[str, Any] | None = None
    runs: tuple[str, ...] = ()
    damaged_lines: int = 0

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_log(path: str | os.PathLike[str], *, run: str | None = None) -> Log:
    """Read what counts of a run's log. It may be being written meanwhile.

    Args:
        path: the file, or the project's directory that it lies in.
        run: id of the run to read; None for the one that logged last.

    Raises:
        FileNotFoundError: there is no log.
        UsageError: the log has no such run.
    """
    place = Path(path)
    place = place / LOG_NAME if place.is_dir() else place
    if not place.exists():
        raise FileNotFoundError(
            f"there is no log at {place}: accelerator.log() makes {LOG_NAME} in its project_dir with the "
            "first row"
        )
    lines = _Lines()
    with place.open("rb") as file:
        for data in file:
            lines.add(data)
    if run is not None and run not in lines.runs:
        raise UsageError(
            f"{place} has no rows of run {run!r}; it has: {', '.join(lines.runs) or 'none at all'}"
        )
    return lines.log_of(run if run is not None else lines.newest)


@dataclass(slots=True)
class _Node:
    row: Row
    before: _Node | None
    count: int


class _History:
    """Where a run was at each length of the file."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.heads: list[_Node | None] = []
        self.config: Mapping[str, Any] | None = None
        self.project: str | None = None

    def move(self, offset: int, head: _Node | None) -> None:
        self.offsets.append(offset)
        self.heads.append(head)

    def at(self, offset: int) -> _Node | None:
        found = bisect_right(self.offsets, offset)
        return self.heads[found - 1] if found else None

    @property
    def head(self) -> _Node | None:
        return self.heads[-1] if self.heads else None


class _Lines:
    def __init__(self) -> None:
        self.runs: dict[str, _History] = {}
        self.newest: str | None = None
        self.damaged = 0
        self._offset = 0

    def add(self, data: bytes) -> None:
        self._offset += len(data)
        if not data.endswith(b"\n"):
            self.damaged += 1  # torn, or on its way
            return
        if data == b"\n":  # follows a torn line
            return
        try:
            line = json.loads(data)
            self._take(line, line["kind"], line["run"])
        except (ValueError, KeyError, TypeError):
            self.damaged += 1

    def _take(self, line: dict[str, Any], kind: str, run: str) -> None:
        history = self.runs.setdefault(run, _History())
        if kind == "row":
            row = Row(
                step=line["step"],
                time=line["time"],
                run=run,
                attempt=line["attempt"],
                values=from_json(line["values"]),
                left_out=line.get("left_out", {}),
            )
            history.move(self._offset, _after(history.head, [row]))
        elif kind == "project":
            history.project, history.config = line["project"], from_json(line["config"])
        elif kind == "resumed":
            history.move(self._offset, self._resumed(line, history))
        self.newest = run

    def _resumed(self, line: dict[str, Any], history: _History) -> _Node | None:
        """The row that the run goes on from."""
        come_from = line["come_from"]
        if come_from is None:  # the log that the checkpoint speaks of is not this one
            base = history.head
            while base is not None and base.count > line["rows"]:
                base = base.before
        else:
            parent = self.runs[come_from["run"]]
            base = parent.at(come_from["offset"])
            history.project = history.project or parent.project
            history.config = history.config or parent.config
        kept = [] if line["kept_from"] is None else _since(history.head, history.at(line["kept_from"]))
        return _after(base, kept)

    def log_of(self, run: str | None) -> Log:
        if self.damaged:
            _log.debug("%d lines of the log could not be read", self.damaged)
        if run is None:
            return Log(rows=(), damaged_lines=self.damaged)
        history = self.runs[run]
        return Log(
            rows=tuple(_since(history.head, None)),
            run=run,
            project=history.project,
            config=history.config,
            runs=tuple(self.runs),
            damaged_lines=self.damaged,
        )


def _after(head: _Node | None, rows: list[Row]) -> _Node | None:
    for row in rows:
        head = _Node(row, head, 1 if head is None else head.count + 1)
    return head


def _since(head: _Node | None, start: _Node | None) -> list[Row]:
    rows = []
    while head is not None and head is not start:
        rows.append(head.row)
        head = head.before
    return rows[::-1]
