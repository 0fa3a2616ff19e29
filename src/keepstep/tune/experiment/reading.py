"""An experiment at an address, in a directory or a bucket: its journal, read without changing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from keepstep.checkpoint.place.registry import is_address
from keepstep.tune.experiment.journal import JOURNAL_NAME, LocalLog, Log, Told, parse_journal
from keepstep.tune.experiment.records import Record

__all__ = ["Looked", "log_of", "look_at", "read_experiment", "whole_address"]

_BUCKET_LOG: Final = "keepstep.tune.experiment.bucket_log"  # loaded when it is asked for


def whole_address(path: str | os.PathLike[str]) -> str:
    """The address of a directory or of a place in a bucket, as others compare and extend it."""
    return os.fspath(path).rstrip("/") if is_address(path) else str(Path(path).expanduser().absolute())


@dataclass(slots=True)
class Looked:
    """What the journal of an experiment said when it was looked at, so that it need not be read again.

    Attributes:
        log: the journal.
        data: its bytes.
        told: what they say.
    """

    log: Log
    data: bytes
    told: Told


def log_of(address: str, storage_options: Mapping[str, Any] | None) -> Log:
    """Where the bytes of an experiment's journal live.

    Args:
        address: of its directory.
        storage_options: for a bucket.
    """
    if is_address(address):
        log: Log = import_module(_BUCKET_LOG).BucketLog(address, storage_options)
        return log
    return LocalLog(Path(address) / JOURNAL_NAME)


def read_experiment(address: str, storage_options: Mapping[str, Any] | None = None) -> list[Record]:
    """What the journal of an experiment says.

    Args:
        address: of its directory.
        storage_options: for a bucket.

    Raises:
        ExperimentNotFoundError: there is none.
        JournalError: it is damaged.
    """
    return look_at(address, storage_options).told.records


def look_at(address: str, storage_options: Mapping[str, Any] | None = None) -> Looked:
    """As `read_experiment`, for somebody who is going to open it."""
    log = log_of(address, storage_options)
    data = log.read()
    return Looked(log, data, parse_journal(data, str(log)))
