"""Rows as one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from keepstep.track.adapters.rows import RowsTracker

__all__ = ["JSONLTracker"]


class JSONLTracker(RowsTracker):
    """Writes `logging_dir/run_name/metrics.jsonl`; see `RowsTracker`."""

    name = "jsonl"
    suffix = ".jsonl"

    def add(self, row: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(row).encode())

    def read(self) -> list[dict[str, Any]]:
        # Without a line that was torn: what follows the last line break.
        whole = self.path.read_bytes().rpartition(b"\n")[0].decode()
        return [json.loads(line) for line in whole.splitlines() if line]

    def text_of(self, rows: list[dict[str, Any]]) -> str:
        return "".join(map(_line, rows))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
