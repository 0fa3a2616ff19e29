"""What trackers have in common that write one file of rows, each with its number, step and time."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepstep.files import LocalFiles
from keepstep.track.general import GeneralTracker
from keepstep.track.position import Position
from keepstep.track.values import joined, plain_config, to_json

__all__ = ["RowsTracker"]


class RowsTracker(GeneralTracker, ABC):
    """Writes `logging_dir/run_name/metrics.*`, a row a call of `log`.

    A row has `_row`, its number from 0; `_step`; `_time`, seconds since 1970; and the values, nested names
    joined by "/". The configuration goes to `config.json` beside it. A resumed run's file is cut to the rows
    that its checkpoint counts, atomically. A file that another run left is set aside as `metrics-1.*`.

    Args:
        run_name: name of the directory.
        logging_dir: that it lies in.
    """

    requires_logging_directory = True
    suffix = ""

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(logging_dir) / run_name / f"metrics{self.suffix}"
        self._files = LocalFiles()
        self._rows = 0
        self._continued = False

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    def begin(self, run: str, *, continued: bool) -> None:
        self._continued = continued

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self._continued:
            taken = 1
            while (aside := self.path.with_stem(f"metrics-{taken}")).exists():
                taken += 1
            self._files.rename(self.path, aside)

    def rewind(self, position: Position) -> None:
        rows = self.read() if self.path.exists() else []
        last = rows[len(rows) - position.kept :]
        counted = rows[: len(rows) - position.kept]
        self._rows = position.rows + len(last)
        numbers = range(position.rows, self._rows)
        self._replace(
            [
                *(row for row in counted if row["_row"] < position.rows),
                *({**row, "_row": number} for number, row in zip(numbers, last, strict=True)),
            ]
        )

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        plain = to_json(plain_config(values, tracker=self.name))[0]
        self._write(self.path.with_name("config.json"), json.dumps(plain, indent=1).encode() + b"\n")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        plain = joined(to_json(values)[0])
        self.add({"_row": self._rows, "_step": step, "_time": round(time.time(), 3), **plain})
        self._rows += 1

    @abstractmethod
    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""

    @abstractmethod
    def read(self) -> list[dict[str, Any]]:
        """All whole rows, each with `_row` as an integer."""

    @abstractmethod
    def content_of(self, rows: list[dict[str, Any]]) -> bytes:
        """A whole file of these rows."""

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        """Write the file anew; whoever reads it sees the old one or the new one."""
        self._write(self.path, self.content_of(rows))

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.tmp")
        self._files.write_file(unfinished, content)
        self._files.rename(unfinished, path)
