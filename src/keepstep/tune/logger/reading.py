"""The results of a trial, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepstep.checkpoint.place.registry import is_address, open_objects
from keepstep.tune.logger.encoding import parse_lines
from keepstep.tune.result import EXPR_RESULT_FILE

__all__ = ["read_file", "read_results"]


def read_file(directory: str, name: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """The text of a file in a trial's directory, or below its address in a bucket; None: there is none.

    Raises:
        BucketError: the bucket can't be reached.
    """
    try:
        if is_address(directory):
            return open_objects(directory, storage_options).get(name).decode(errors="replace")
        return Path(directory, name).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_results(directory: str, storage_options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """All results of a trial that `result.json` has, oldest first."""
    return parse_lines(read_file(directory, EXPR_RESULT_FILE, storage_options) or "")
