"""Where an experiment lives, and who runs it: its directory, its lock, its journal."""

from __future__ import annotations

import datetime as dt
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keepstep.checkpoint.place.registry import is_address
from keepstep.disk_errors import disk_errors
from keepstep.errors import ExperimentBusyError, ExperimentNotFoundError, UsageError
from keepstep.files import LocalFiles
from keepstep.locks import DirectoryLock
from keepstep.tune.experiment.journal import JOURNAL_NAME, Journal, LocalLog, Log, parse_journal
from keepstep.tune.experiment.reading import Looked, log_of, read_experiment
from keepstep.tune.experiment.records import DriverStarted, Record

__all__ = ["DEFAULT_STORAGE", "Opened", "address_of", "free_name", "open_experiment"]

DEFAULT_STORAGE: Final = "~/keepstep_results"


def address_of(storage_path: Any, name: str) -> str:
    """The address of an experiment's directory.

    Args:
        storage_path: as in `RunConfig`.
        name: of the experiment.
    """
    if storage_path is not None and is_address(storage_path):
        return f"{str(storage_path).rstrip('/')}/{name}"
    return str(
        Path(storage_path if storage_path is not None else DEFAULT_STORAGE).expanduser().absolute() / name
    )


def free_name(storage_path: Any, trainable: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """A name that no experiment has yet, of the trainable's name and the time."""

    def exists(address: str) -> bool:
        if not is_address(address):
            return Path(address).exists()
        try:
            return bool(read_experiment(address, storage_options))
        except ExperimentNotFoundError:
            return False

    base = f"{trainable}_{dt.datetime.now().astimezone():%Y-%m-%d_%H-%M-%S}"
    name, number = base, 2
    while exists(address_of(storage_path, name)):
        name, number = f"{base}_{number}", number + 1
    return name


@dataclass(slots=True)
class Opened:
    """An experiment that this process runs.

    Attributes:
        address: of its directory.
        journal: to append to.
        records: what it says so far; [] for a new one.
        release: let another process have it.
    """

    address: str
    journal: Journal
    records: list[Record]
    release: Callable[[], None]


def open_experiment(
    address: str, storage_options: Mapping[str, Any] | None = None, *, looked: Looked | None = None
) -> Opened:
    """Take an experiment over, or make room for a new one; what a kill left torn in its journal is cut off.

    Args:
        address: of its directory.
        storage_options: for a bucket.
        looked: what was read of it before; what came since counts, too.

    Raises:
        ExperimentBusyError: another process runs it.
        JournalError: its journal is damaged.
        StoreError, UsageError: the place refuses.
    """
    log, release = _taken(address, storage_options, looked)
    try:
        try:
            data = log.read()
            told = looked.told if looked and looked.data == data else parse_journal(data, str(log))
        except ExperimentNotFoundError:
            return Opened(address, Journal(log), [], release)
        log.cut(told.size)
    except BaseException:
        release()
        raise
    return Opened(address, Journal(log), told.records, release)


def _taken(
    address: str, storage_options: Mapping[str, Any] | None, looked: Looked | None
) -> tuple[Log, Callable[[], None]]:
    """Its journal, held against others; in a bucket another process that appends shuts this one out."""
    if is_address(address):
        log = looked.log if looked is not None else log_of(address, storage_options)
        return log, log.close
    return _local(Path(address))


def _local(directory: Path) -> tuple[Log, Callable[[], None]]:
    with disk_errors(directory, "making", left="No trial was started", room="choose another storage_path"):
        try:
            LocalFiles().make_directory(directory)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(
                f"{directory} can't be the directory of an experiment: it, or one above it, is a file. "
                "Choose another RunConfig.name or storage_path"
            ) from None
    log = LocalLog(directory / JOURNAL_NAME)
    try:
        lock = DirectoryLock(directory)
    except BlockingIOError:
        raise ExperimentBusyError(
            f"{directory} is being run by {_driver(log)}. One process at a time runs an experiment: stop "
            "that one, or give this one another RunConfig.name"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return log, log.close

    def release() -> None:
        log.close()
        lock.release()

    return log, release


def _driver(log: Log) -> str:
    try:
        records = parse_journal(log.read(), str(log)).records
    except ExperimentNotFoundError:
        return "another process"
    found = [record for record in records if isinstance(record, DriverStarted)]
    return f"process {found[-1].pid} on {found[-1].host}" if found else "another process"
