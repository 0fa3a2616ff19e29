"""Rows as one JSON object a line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from keepstep.track.adapters.rows import RowsTracker
from keepstep.track.values import json_line

__all__ = ["JSONLTracker"]


class JSONLTracker(RowsTracker):
    """Writes `logging_dir/run_name/metrics.jsonl`; see `RowsTracker`."""

    name = "jsonl"
    suffix = ".jsonl"

    def add(self, row: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json_line(row))

    def read(self) -> list[dict[str, Any]]:
        # Without a line that was torn: what follows the last line break.
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        rows: list[dict[str, Any]] = []
        for line in whole.split(b"\n"):
            with contextlib.suppress(ValueError):  # what a full disk or a power cut has torn
                rows.append(json.loads(line))
        return rows

    def content_of(self, rows: list[dict[str, Any]]) -> bytes:
        return b"".join(map(json_line, rows))
