"""An experiment's journal: JSON lines, only ever appended, durable before anybody acts on them.

Each line ends with its own digest, so that a line that was torn, or changed since, is found. What a kill left
torn at the end is dropped when the journal is opened again: nobody has acted on it.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import xxhash

from keepstep.disk_errors import disk_errors
from keepstep.errors import ExperimentNotFoundError, JournalError, NoSpaceError, StoreError
from keepstep.files import Files, LocalFiles
from keepstep.tune.experiment.records import FORMAT, ExperimentMade, Record, parse_record, to_node

__all__ = ["JOURNAL_NAME", "Journal", "LocalLog", "Log", "Told", "parse_journal", "read_journal"]

JOURNAL_NAME: Final = "journal.jsonl"
_DIGEST_CHARACTERS: Final = 16
_JSON: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


class Log(Protocol):
    """Where a journal's bytes live."""

    def read(self) -> bytes:
        """All of it.

        Raises:
            ExperimentNotFoundError: there is none.
        """

    def append(self, data: bytes) -> None:
        """Append; durable on return. If it raises, nothing was appended that anybody will find."""

    def cut(self, size: int) -> None:
        """Drop everything behind the first `size` bytes."""

    def close(self) -> None:
        """Free what it holds; it opens again when it is needed."""


class LocalLog:
    """A journal in a file.

    Args:
        path: of the file; made with the first line.
        files: how the disk is changed.
    """

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self.path = path
        self._files = files if files is not None else LocalFiles()
        self._fd = -1

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ExperimentNotFoundError(
                f"{self.path.parent} holds no experiment ({JOURNAL_NAME} is missing). Name the directory of "
                "an experiment: <storage_path>/<name>"
            ) from None

    def append(self, data: bytes) -> None:
        with _disk_errors(self.path, "adding results to"):
            fd = self._open()
            size = os.fstat(fd).st_size
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fdatasync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
        self._check_still_there()

    def _check_still_there(self) -> None:
        """What is appended to a file that has no name any more, or another one, nobody would find."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(self.path.stat(), os.fstat(self._fd)):
                return
        raise StoreError(
            f"{self.path} was moved, replaced or deleted while its experiment runs. Trials are stopped. If "
            "it was moved, go on where it is now by Tuner.restore; don't move an experiment that runs"
        )

    def _open(self) -> int:
        if self._fd < 0:
            new = not self.path.exists()
            self._files.make_directory(self.path.parent)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if new:
                self._files.sync_directory(self.path.parent)
        return self._fd

    def cut(self, size: int) -> None:
        with _disk_errors(self.path, "opening"):
            os.ftruncate(self._open(), size)
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _disk_errors(path: Path, doing: str) -> contextlib.AbstractContextManager[None]:
    return disk_errors(
        path,
        doing,
        left="What it holds is whole",
        room="keep fewer checkpoints (CheckpointConfig.num_to_keep, RunConfig.byte_budget)",
    )


class Told(NamedTuple):
    """What a journal says: its records, and how many bytes of it are whole."""

    records: list[Record]
    size: int


def parse_journal(data: bytes, name: str) -> Told:
    """The records of a journal, without what a kill left torn at its end.

    Args:
        data: its bytes.
        name: of the journal, for messages.

    Raises:
        JournalError: it is damaged in the middle, or newer than this keepstep.
    """
    lines = data.split(b"\n")
    records: list[Record] = []
    size = 0
    for number, line in enumerate(lines[:-1], 1):
        node = _parse_line(line)
        if node is None:
            if any(_parse_line(later) for later in lines[number:]):
                raise JournalError(
                    f"line {number} of {name} is damaged, and sound ones follow it: it was changed after it "
                    "was written. Put a copy of the journal in its place; or cut it before that line, and "
                    "what happened later is run again"
                )
            break
        records.append(_record(node, name, number))
        size += len(line) + 1
    if records and not isinstance(records[0], ExperimentMade):
        raise JournalError(
            f"{name} does not begin with a record of the kind 'experiment': its head is missing"
        )
    return Told(records, size)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    body, mark, rest = line.rpartition(b',"x":"')
    if not mark or len(rest) != _DIGEST_CHARACTERS + 2 or not rest.endswith(b'"}'):
        return None
    if xxhash.xxh3_64_hexdigest(body).encode() != rest[:_DIGEST_CHARACTERS]:
        return None
    node = json.loads(body + b"}")
    return node if isinstance(node, dict) else None


def _record(node: dict[str, Any], name: str, number: int) -> Record:
    if node.get("kind") == ExperimentMade.kind and node.get("format", FORMAT) > FORMAT:
        raise JournalError(
            f"{name} has format {node['format']}; this keepstep reads up to {FORMAT}: upgrade keepstep"
        )
    try:
        return parse_record(node)
    except JournalError as error:
        raise JournalError(f"line {number} of {name}: {error}") from None


def dump_record(record: Record) -> bytes:
    """One line."""
    node = to_node(record)
    try:
        body = _JSON.encode(node)[:-1].encode()
    except UnicodeEncodeError:  # half of a character, as in names that are not UTF-8
        body = json.dumps(node, separators=(",", ":"))[:-1].encode()
    return body + b',"x":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def read_journal(directory: Path) -> list[Record]:
    """What the journal of an experiment in a directory says; nothing is changed.

    Raises:
        ExperimentNotFoundError: there is none.
        JournalError: it is damaged, or newer than this keepstep.
    """
    log = LocalLog(directory / JOURNAL_NAME)
    return parse_journal(log.read(), str(log)).records


class Journal:
    """Appends records.

    Args:
        log: where they go.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: list[bytes] = []
        self.records = 0
        self.bytes = 0

    def add(self, record: Record) -> None:
        """A record, durable with the next `commit`."""
        self._waiting.append(dump_record(record))

    def commit(self) -> None:
        """Make everything that was added durable, in one go.

        Raises:
            NoSpaceError, StoreError: it can't be; nothing of it is there.
        """
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        try:
            self._log.append(data)
        except NoSpaceError as error:
            raise NoSpaceError(
                f"{error}. Trials are stopped: what they did since is run again when the experiment goes on"
            ) from error
        self.records += len(self._waiting)
        self.bytes += len(data)
        self._waiting.clear()

    def close(self) -> None:
        """Free the file."""
        self._log.close()
