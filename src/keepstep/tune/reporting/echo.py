"""What trials print, shown in the driver's own output: followed in their files, a bounded amount a turn."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from keepstep.tune.experiment.trial import Trial
from keepstep.tune.reporting.standard import write_out
from keepstep.tune.reporting.words import bytes_in_words

__all__ = ["Echo"]

_BYTES_A_TURN: Final = 64 << 10
_LINE_BYTES: Final = 4 << 10
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[^\[]")


class _Followed:
    """One file of a trial."""

    __slots__ = ("begun", "offset", "path", "torn")

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.offset = offset
        self.begun = b""
        """A line whose end is not there yet."""
        self.torn = False
        """Whether what comes next is the rest of a line whose beginning was left out."""


class Echo:
    """Shows what trials print, line by line, with the trial's name in front.

    Args:
        write: takes whole lines; None: standard output, as it is when they are written.
        bytes_a_turn: of each file; what is beyond is counted, not shown.
    """

    def __init__(
        self, write: Callable[[str], object] | None = None, *, bytes_a_turn: int = _BYTES_A_TURN
    ) -> None:
        self._write = write if write is not None else write_out
        self._most = bytes_a_turn
        self._followed: dict[str, list[_Followed]] = {}

    def start(self, trial: Trial, files: Iterable[Path]) -> None:
        """A trial is about to start: what is in its files already was shown before.

        Args:
            trial: which.
            files: where its output goes.
        """
        self._followed[trial.trial_id] = [_Followed(path, _size(path)) for path in files]

    def turn(self, trials: Iterable[Trial]) -> None:
        """Show what these trials have printed since."""
        text = "".join(
            self._news(trial, file, last=False)
            for trial in trials
            for file in self._followed.get(trial.trial_id, ())
        )
        self._out(text)

    def end(self, trial: Trial) -> None:
        """A trial ended: show the rest, and forget about it."""
        self._out(
            "".join(self._news(trial, file, last=True) for file in self._followed.pop(trial.trial_id, ()))
        )

    def _news(self, trial: Trial, file: _Followed, *, last: bool) -> str:
        size = _size(file.path)
        if size < file.offset:  # begun anew
            file.offset, file.begun = 0, b""
        if size == file.offset and not (last and file.begun):
            return ""
        data, skipped = _read(file, size, self._most)
        *lines, rest = (file.begun + data).split(b"\n")
        if last or len(rest) > _LINE_BYTES:
            lines, rest = [*lines, rest] if rest else lines, b""
        file.begun = rest
        shown = "".join(f"({trial}) {_readable(line)}\n" for line in lines)
        if skipped:
            shown += f"({trial}) ... {bytes_in_words(skipped)} more in {file.path}\n"
        return shown

    def _out(self, text: str) -> None:
        if text:
            with contextlib.suppress(OSError):  # it is in the trial's files as well
                self._write(text)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(file: _Followed, size: int, most: int) -> tuple[bytes, int]:
    """What came since, up to the last line end within `most` bytes; and how many bytes were left out."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b"", 0
    try:
        data = os.pread(fd, min(size - file.offset, most), file.offset)
        last = os.pread(fd, 1, size - 1)
    finally:
        os.close(fd)
    skipped = size - file.offset - len(data)
    if file.torn:
        _, end, data = data.partition(b"\n")
        file.torn = not end
    file.offset = size
    if skipped > 0:
        whole = data[: data.rfind(b"\n") + 1] or data + b"\n"
        file.torn = last != b"\n"
        return whole, skipped + max(0, len(data) - len(whole))
    return data, 0


def _readable(line: bytes) -> str:
    """A line as it stands at last: of a progress bar the last state, nothing that a terminal acts on."""
    if len(line) > _LINE_BYTES:
        line = line[:_LINE_BYTES] + f" ... {bytes_in_words(len(line) - _LINE_BYTES)} more".encode()
    text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
    text = _ESCAPES.sub("", text)
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\t" else "" for c in text)
