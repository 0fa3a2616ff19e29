"""Rows as a table that every spreadsheet opens."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from keepstep.track.adapters.rows import RowsTracker

__all__ = ["CSVTracker"]


class CSVTracker(RowsTracker):
    """Writes `logging_dir/run_name/metrics.csv`; see `RowsTracker`.

    A value under a new name adds a column at the end; earlier rows are empty there.
    """

    name = "csv"
    suffix = ".csv"
    _columns: tuple[str, ...] = ()

    def add(self, row: Mapping[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._replace([*(self.read() if self.path.exists() else []), dict(row)])
            return
        line = io.StringIO(newline="")
        csv.DictWriter(line, self._columns).writerow(row)
        with self.path.open("ab") as file:
            file.write(_encoded(line))

    def read(self) -> list[dict[str, Any]]:
        # Without a line that was torn: what follows the last line break.
        whole = self.path.read_bytes().rpartition(b"\n")[0].decode(errors="replace")
        rows = csv.DictReader(io.StringIO(whole, newline=""))
        return [{**row, "_row": int(row["_row"])} for row in rows if (row.get("_row") or "").isdecimal()]

    def content_of(self, rows: list[dict[str, Any]]) -> bytes:
        self._columns = tuple(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns)
        if self._columns:
            table.writeheader()
        table.writerows(rows)
        return _encoded(text)


def _encoded(text: io.StringIO) -> bytes:
    """In UTF-8; half of a character, as in names of files that are none, by its escape."""
    return text.getvalue().encode(errors="backslashreplace")
