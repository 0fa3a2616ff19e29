"""The trackers of one run, and its own log beside them: begun, logged to, rewound, finished.

A run that is resumed may call `init_trackers` before `resume` or after it. So where there is something to
resume, trackers are opened only once it is known which run this is: with `resume`, or with the first row.

`resume()` means that the training goes on: what was logged after the checkpoint counts no more at once.
`load_state()` may also be a look back, to evaluate the best model say: there it counts no more only if the
training then takes a step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepstep.errors import UsageError
from keepstep.track.general import BlankTracker, GeneralTracker
from keepstep.track.position import LogState, Position
from keepstep.track.registry import NOT_HERE, known_names, resolve
from keepstep.track.runlog import LOG_NAME, RunLog
from keepstep.track.values import check_config, checked_step, with_numbers

__all__ = ["Origin", "Trackers"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that was loaded.

    Attributes:
        run: that it is of; None for one that is none of the project's automatic ones.
        attempt: of that run, that saved it.
        log: what `Trackers.provenance` said when it was saved.
    """

    run: str | None
    attempt: int
    log: Mapping[str, Any]


@dataclass(kw_only=True)
class _Loaded:
    """A checkpoint that the training may go on from."""

    come_from: Mapping[str, Any] | None
    position: Position
    steps: int
    log_bytes: int
    kept: int = 0


class Trackers:
    """What `Accelerator.log` writes to, on one rank.

    Args:
        log_with: as for `Accelerator`.
        state: what checkpoints hold of the log.
        is_main: whether this is the main process.
        logging_dir: where trackers write that require a directory.
        log_dir: where the run's own log is; None for none.
        run: id of the run, at the time of the call.
        steps_done: optimizer steps so far.
        may_resume: whether there is something that the run may be resumed from.

    Attributes:
        names: of the trackers that `log_with` asks for.

    Raises:
        MissingPackageError, UsageError: as for `keepstep.track.registry.resolve`.
    """

    def __init__(
        self,
        log_with: Any,
        *,
        state: LogState,
        is_main: bool,
        logging_dir: str | os.PathLike[str] | None,
        log_dir: Path | None,
        run: Callable[[], str],
        steps_done: Callable[[], int],
        may_resume: Callable[[], bool],
    ) -> None:
        self._state = state
        self._is_main = is_main
        self._logging_dir = logging_dir
        self._wanted = resolve(log_with, logging_dir=logging_dir, is_main=is_main)
        self.names = tuple(self._wanted)
        self._needs_init = log_with is not None and log_with not in ([], ())
        self._run_log = RunLog(log_dir / LOG_NAME) if is_main and log_dir is not None else None
        self._own_run, self._steps_done, self._may_resume = run, steps_done, may_resume
        self._trackers: dict[str, GeneralTracker] | None = None
        self._open: list[GeneralTracker] = []
        self._started_as: str | None = None
        self._logged_as: str | None = None
        self._project: str | None = None
        self._config: Mapping[str, Any] | None = None
        self._origin: Origin | None = None
        self._loaded: _Loaded | None = None
        self._rewind_at_start: Position | None = None
        self._told: set[str] = set()

    # -- opening --------------------------------------------------------------------------------------

    def init(
        self, project: str, config: Mapping[str, Any] | None, init_kwargs: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Make the trackers; open them, unless it depends on a resume that may follow."""
        check_config(config)
        check_names(init_kwargs, "init_trackers(init_kwargs=...)", self.names)
        if self._trackers is not None:
            raise UsageError("init_trackers() was called twice. Call end_training() before it begins anew")
        self._project, self._config, self._logged_as = project, config, None
        self._trackers = {
            name: self._made(name, kind, project, init_kwargs.get(name, {}))
            for name, kind in self._wanted.items()
            if kind is not None
        }
        has_log = self._run_log is not None and self._run_log.size_bytes > 0
        if self._origin is not None or not (has_log or self._may_resume()):
            self.start()

    def _made(
        self, name: str, kind: type[GeneralTracker] | GeneralTracker, project: str, options: Mapping[str, Any]
    ) -> GeneralTracker:
        if isinstance(kind, GeneralTracker):
            return kind
        place = [self._logging_dir] if kind.requires_logging_directory else []
        make: Callable[..., GeneralTracker] = kind
        try:
            return make(project, *place, **options)
        except TypeError as error:
            raise UsageError(
                f"init_trackers(init_kwargs={{{name!r}: ...}}) holds options that {kind.__name__} doesn't "
                f"take: {error}"
            ) from error

    @property
    def _run(self) -> str:
        origin = self._origin
        return self._own_run() if origin is None or origin.run is None else origin.run

    def start(self) -> None:
        """Open trackers, if they are made and not open yet."""
        if self._trackers is None or self._started_as is not None:
            return
        run = self._started_as = self._run
        for tracker in self._trackers.values():
            tracker.begin(run, continued=self._origin is not None)
            tracker.start()
            self._open.append(tracker)
            if self._rewind_at_start is not None:
                tracker.rewind(self._rewind_at_start)
            if self._config is not None:
                tracker.store_init_configuration(dict(self._config))
        self._rewind_at_start = None

    # -- logging --------------------------------------------------------------------------------------

    def log(self, values: Any, step: Any, log_kwargs: Mapping[str, Mapping[str, Any]]) -> None:
        """Log values to the run's log and every tracker.

        Raises:
            UsageError: `init_trackers` has not been called, or an argument is of a wrong kind.
        """
        if self._needs_init and self._trackers is None:
            raise UsageError(
                "log() was called before init_trackers(), or after end_training(). Call init_trackers(name) "
                "once, before the first log()"
            )
        check_names(log_kwargs, "log(log_kwargs=...)", self.names)
        number = self._state.next_step if step is None else checked_step(step)
        if self._loaded is not None and self._steps_done() > self._loaded.steps:
            self._go_on()
        self.start()
        numbers = with_numbers(values) if self._trackers or self._run_log is not None else {}
        self._state.count(number)
        if self._loaded is not None:
            self._loaded.kept += 1
        if self._run_log is not None:
            self._log_row(self._run_log, number, numbers)
        elif self._is_main and not self._trackers:
            self._tell_once(
                "",
                "log() has nowhere to write: there is neither a tracker nor a directory on a disk. Pass "
                "Accelerator(project_dir=...) or log_with=...; for a project in a bucket "
                "ProjectConfiguration(logging_dir=...)",
            )
        for name, tracker in (self._trackers or {}).items():
            tracker.log(numbers, step=number, **log_kwargs.get(name, {}))

    def _log_row(self, log: RunLog, step: int, values: Mapping[str, Any]) -> None:
        self._begin_log(log)
        left_out = log.row(run=self._run, attempt=self._attempt, step=step, values=values)
        if not self._trackers:
            for name, kind in left_out.items():
                self._tell_once(name, f"{name} is left out of {log.path}: a log holds no {kind}")

    def _begin_log(self, log: RunLog) -> None:
        """Say in the log which run its rows are of, unless that is clear."""
        run = self._run
        if self._logged_as == run:
            return
        if self._origin is None or self._origin.run is None:
            log.started(run=run)
        if self._project is not None:
            log.project(run=run, attempt=self._attempt, name=self._project, config=self._config or {})
        self._logged_as = run

    def _tell_once(self, name: str, message: str) -> None:
        if name not in self._told:
            self._told.add(name)
            _log.warning(message)

    @property
    def _attempt(self) -> int:
        origin = self._origin
        return 1 if origin is None or origin.run is None else origin.attempt + 1

    def get(self, name: str, *, unwrap: bool) -> Any:
        """A tracker by its name; a blank one on a rank where it has nothing to do."""
        self.start()
        tracker = (self._trackers or {}).get(name)
        if tracker is not None:
            return tracker.tracker if unwrap else tracker
        if self._wanted.get(name, name) is None:
            return BlankTracker()
        if self._trackers is None:
            raise UsageError(f"get_tracker({name!r}): call init_trackers() first")
        raise UsageError(
            f"get_tracker({name!r}): the Accelerator has no such tracker; it has: "
            f"{', '.join(self.names) or 'none'}. Name it in log_with"
        )

    @property
    def all(self) -> list[GeneralTracker]:
        """Every tracker on this rank, once `init` was called."""
        self.start()
        return list((self._trackers or {}).values())

    def finish(self) -> None:
        """Close everything; may be called again."""
        self._close()
        self._trackers = None
        if self._run_log is not None:
            self._run_log.close()

    def _close(self) -> None:
        opened, self._open, self._started_as = self._open, [], None
        for tracker in opened:
            tracker.finish()

    # -- checkpoints ----------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint writes down beside its state: up to where the log is this run's, in bytes."""
        if self._run_log is None or (self._logged_as is None and self._origin is None):
            return {}
        if self._loaded is not None:  # it is not clear yet that the training goes on from there
            return {"log": self._loaded.come_from} if self._loaded.come_from else {}
        self._run_log.sync()
        return {"log": {"run": self._run, "attempt": self._attempt, "offset": self._run_log.size_bytes}}

    def loaded(self, origin: Origin, *, goes_on: bool) -> None:
        """Take note of a checkpoint that was loaded; `state` holds what it said.

        Args:
            origin: which one.
            goes_on: the training goes on from it for sure; else only if it takes a step.
        """
        log, note = self._run_log, origin.log
        is_here = log is not None and bool(note) and log.holds(note["run"], note["offset"])
        # One that was saved into a directory of the user's choice says in its note alone which run it is of.
        self._origin = replace(origin, run=note["run"], attempt=note["attempt"]) if is_here else origin
        self._loaded = _Loaded(
            come_from=dict(note) if is_here else None,
            position=Position(rows=self._state.rows, last_step=self._state.last_step),
            steps=self._steps_done(),
            log_bytes=0 if log is None else log.size_bytes,
        )
        if self._trackers and self._started_as not in (None, self._run):
            self._change_run()
        if goes_on:
            self._go_on()
        self.start()

    def _change_run(self) -> None:
        """Trackers were opened for a new run, and this is an earlier one that goes on."""
        if self._is_main:
            _log.warning(
                "Trackers had begun a new run before the checkpoint was loaded, and now go on with the run "
                "that it is of. Call log() and get_tracker() after resume()"
            )
        self._close()

    def _go_on(self) -> None:
        """Rows after the checkpoint count no more, but for those that were logged since it was loaded."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        before = loaded.position
        position = Position(rows=before.rows, last_step=before.last_step, kept=loaded.kept)
        if self._run_log is not None and (self._run_log.size_bytes or before.rows):
            self._run_log.resumed(
                run=self._run,
                attempt=self._attempt,
                rows=before.rows,
                come_from=loaded.come_from,
                kept_from=loaded.log_bytes if loaded.kept else None,
            )
        if self._started_as is None:
            self._rewind_at_start = position
            return
        for tracker in self._open:
            tracker.rewind(position)


def check_names(options: Mapping[str, Any], where: str, names: tuple[str, ...]) -> None:
    """Refuse options for trackers that there are not; for those that are not used they may be given.

    Raises:
        UsageError: naming them.
    """
    allowed = [name for name in {*names, *known_names()} if name != "all"]
    unknown = sorted(set(options) - set(allowed) - set(NOT_HERE))
    if unknown:
        raise UsageError(
            f"{where} is for {', '.join(map(repr, unknown))}, and there is no such tracker; there are: "
            f"{', '.join(sorted(allowed))}"
        )
