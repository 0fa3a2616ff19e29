"""The files of each trial, for people and tools: `result.json`, `progress.csv`, `params.json`, `error.txt`.

They show what the journal says and hold nothing of their own: they are not synced to the disk, and made anew
from the journal after a kill.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from keepstep.checkpoint.place.registry import is_address, open_objects
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.encoding import Table, encoded, json_line, params_text, row_of
from keepstep.tune.logger.uploads import Uploads
from keepstep.tune.result import (
    EXPR_ERROR_FILE,
    EXPR_PARAM_FILE,
    EXPR_PROGRESS_FILE,
    EXPR_RESULT_FILE,
)

__all__ = ["TrialFiles"]

_log = logging.getLogger(__name__)
_UPLOAD_EVERY_S: Final = 30.0


class _Open:
    """What is known of a trial's files while it may still report."""

    __slots__ = ("directory", "lines", "results", "rows", "table")

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.results: list[Mapping[str, Any]] = []
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.table: Table | None = None
        """None: `progress.csv` was not looked at yet."""


class TrialFiles:
    """Writes the files of all trials of an experiment.

    A disk that refuses is said once; what could not be written is tried again with the next `flush`.

    Args:
        address: of the experiment's directory; of a bucket: files are written to a temporary directory
            and uploaded when their trial ends, and every 30 s before.
        storage_options: for a bucket.
        upload_every_s: seconds between two uploads of a trial that runs.
    """

    def __init__(
        self,
        address: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        upload_every_s: float = _UPLOAD_EVERY_S,
    ) -> None:
        self._root = address.rstrip("/")
        self._uploads: Uploads | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if is_address(address):
            self._scratch = tempfile.TemporaryDirectory(prefix="keepstep-")
            self._root = self._scratch.name
            self._uploads = Uploads(open_objects(address, storage_options), Path(self._root), upload_every_s)
        self._open: dict[str, _Open] = {}
        self._waiting: dict[str, _Open] = {}
        self._refused: set[str] = set()

    def directory(self, trial: Trial) -> Path:
        """Where a trial's files are written: its directory, or one that stands in for it."""
        return Path(self._root, trial.dirname)

    def start(self, trial: Trial) -> None:
        """A trial starts, for the first time, again, or with another configuration: write `params.json`."""
        found = self._files_of(trial)
        self._attempt(found, self._put_config, params_text(trial.config))

    def add(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """A result that counts, with its automatic fields; written with the next `flush`, as it is then."""
        found = self._files_of(trial)
        found.results.append(result)
        self._waiting[trial.trial_id] = found

    def failed(self, trial: Trial, error: str, time_s: float) -> None:
        """A trial failed, for good or not: append to `error.txt`.

        Args:
            trial: with `num_failures` counting this one.
            error: its traceback, or how its process ended.
            time_s: when, in seconds since 1970.
        """
        found = self._files_of(trial)
        when = dt.datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d_%H-%M-%S")
        text = f"Failure # {trial.num_failures} (occurred at {when})\n{error.rstrip()}\n"
        self._attempt(found, self._append, EXPR_ERROR_FILE, text)

    def flush(self) -> None:
        """Write what came since the last call: a trial's results in one go."""
        for trial_id, found in list(self._waiting.items()):
            if self._attempt(found, self._write):
                del self._waiting[trial_id]
        if self._uploads is not None:
            self._uploads.start_due()

    def end(self, trial: Trial) -> None:
        """A trial ended: write what it has, and forget about it."""
        found = self._open.pop(trial.trial_id, None)
        if found is None:
            return
        if trial.trial_id in self._waiting and self._attempt(found, self._write):
            del self._waiting[trial.trial_id]
        if self._uploads is not None:
            self._uploads.start(trial.dirname)

    def rebuild(self, trial: Trial, results: Iterable[Mapping[str, Any]]) -> None:
        """After a restart: what differs from the journal is made anew.

        Args:
            trial: as the journal says.
            results: all that count, with their automatic fields, oldest first.
        """
        found = self._files_of(trial)
        found.table = Table()
        results = list(results)
        rows = [row_of(result) for result in results]
        found.table.widen(rows)
        texts = {
            EXPR_RESULT_FILE: "".join(map(json_line, results)),
            EXPR_PROGRESS_FILE: found.table.text(rows, header=True),
            EXPR_PARAM_FILE: params_text(trial.config),
        }
        uploads = self._uploads if trial.is_finished() else None  # a trial that goes on appends to its files
        if uploads is None or not uploads.are_there(trial.dirname, texts):
            for name, text in texts.items():
                self._attempt(found, self._make, name, text)
            if trial.error is not None and not Path(found.directory, EXPR_ERROR_FILE).exists():
                self._attempt(found, self._append, EXPR_ERROR_FILE, f"{trial.error}\n")
        if trial.is_finished():
            self.end(trial)

    def close(self) -> None:
        """Write and upload everything; can be called twice."""
        self.flush()
        uploads, self._uploads = self._uploads, None
        if uploads is not None:
            uploads.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    # ------------------------------------------------------------------------------------ writing

    def _files_of(self, trial: Trial) -> _Open:
        found = self._open.get(trial.trial_id)
        if found is None:
            found = self._open[trial.trial_id] = _Open(f"{self._root}/{trial.dirname}")
        return found

    def _attempt(self, found: _Open, write: Callable[..., None], *what: str) -> bool:
        """Whether it could be written."""
        try:
            write(found, *what)
        except OSError as error:
            if found.directory not in self._refused:
                self._refused.add(found.directory)
                _log.warning(
                    "The files in %s can't be written (%s); the experiment goes on, and they are made anew "
                    "from its journal when it is started again",
                    found.directory,
                    error.strerror or error,
                )
            return False
        self._refused.discard(found.directory)
        return True

    def _write(self, found: _Open) -> None:
        found.lines += map(json_line, found.results)
        found.rows += map(row_of, found.results)
        found.results.clear()
        if found.lines:
            self._append(found, EXPR_RESULT_FILE, "".join(found.lines))
            found.lines.clear()
        if found.rows:
            try:
                self._add_rows(found)
            except OSError:
                found.table = None  # what the file holds is looked at anew
                raise
            found.rows.clear()

    def _add_rows(self, found: _Open) -> None:
        path = f"{found.directory}/{EXPR_PROGRESS_FILE}"
        if found.table is None:
            found.table = Table(Table.parse(_text_of(path))[0])
        table, empty = found.table, not found.table.columns
        wider = table.widen(found.rows)
        if wider and not empty:
            _, before = Table.parse(_text_of(path))
            self._put(found, EXPR_PROGRESS_FILE, table.text([*before, *found.rows], header=True))
        else:
            self._append(found, EXPR_PROGRESS_FILE, table.text(found.rows, header=wider))

    def _put_config(self, found: _Open, text: str) -> None:
        try:
            fd = _open_file(found.directory, EXPR_PARAM_FILE, os.O_EXCL)
        except FileExistsError:
            self._put(found, EXPR_PARAM_FILE, text)
            return
        found.table = Table()  # nothing lies here yet
        try:
            _write_all(fd, text)
        finally:
            os.close(fd)
        self._changed(found, EXPR_PARAM_FILE)

    def _append(self, found: _Open, name: str, text: str) -> None:
        """Append; if it raises, nothing was."""
        fd = _open_file(found.directory, name, os.O_APPEND)
        try:
            size = os.fstat(fd).st_size
            try:
                _write_all(fd, text)
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        self._changed(found, name)

    def _put(self, found: _Open, name: str, text: str) -> None:
        """Write a file anew; whoever reads it sees the old one or the new one."""
        unfinished = f"{name}.tmp"
        fd = _open_file(found.directory, unfinished, os.O_TRUNC)
        try:
            _write_all(fd, text)
        finally:
            os.close(fd)
        Path(found.directory, unfinished).replace(Path(found.directory, name))
        self._changed(found, name)

    def _make(self, found: _Open, name: str, text: str) -> None:
        """Let a file hold this text; one that would be empty need not be there."""
        if _text_of(f"{found.directory}/{name}") != text:
            self._put(found, name, text)

    def _changed(self, found: _Open, name: str) -> None:
        if self._uploads is not None:
            self._uploads.changed(found.directory.removeprefix(f"{self._root}/"), name)


def _text_of(path: str) -> str:
    """The text of a file; "" if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _open_file(directory: str, name: str, how: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how
    try:
        return os.open(f"{directory}/{name}", flags, 0o666)
    except FileNotFoundError:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return os.open(f"{directory}/{name}", flags, 0o666)


def _write_all(fd: int, text: str) -> None:
    data = encoded(text)
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, data[written:])
