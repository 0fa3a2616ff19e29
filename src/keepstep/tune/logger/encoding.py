"""Results and configurations as lines of JSON and rows of CSV, as Ray Tune writes them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from keepstep.track.values import joined

__all__ = ["Table", "encoded", "json_line", "params_text", "parse_lines", "row_of"]


_MOST_NUMBERS: Final = 10_000
"""Of an array; one with more is data that was put into a configuration, and takes seconds to write."""


def encoded(text: str) -> bytes:
    """Text as UTF-8; half of a character, as in names that are not UTF-8, as an escape."""
    return text.encode(errors="backslashreplace")


def _otherwise(value: Any) -> Any:
    """What JSON has no name for: arrays as lists, unless they are data; the rest as Python shows it."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    as_list = getattr(value, "tolist", None)
    few = math.prod(getattr(value, "shape", ())) <= _MOST_NUMBERS
    return as_list() if callable(as_list) and few else repr(value)


_LINE: Final = json.JSONEncoder(default=_otherwise)
_PARAMS: Final = json.JSONEncoder(default=_otherwise, indent=2, sort_keys=True)


def json_line(result: Mapping[str, Any]) -> str:
    """A result as one line; what is not finite is NaN, Infinity and -Infinity there."""
    try:
        return _LINE.encode(result) + "\n"
    except TypeError:  # a name that JSON can't have
        return _LINE.encode(_with_names(result)) + "\n"


def params_text(config: Mapping[str, Any]) -> str:
    """A configuration, for people and for tools; names in order."""
    try:
        return _PARAMS.encode(config) + "\n"
    except TypeError:  # names that JSON can't have, or that have no order
        return _PARAMS.encode(_with_names(config)) + "\n"


def _with_names(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(name): _with_names(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The results of a file of lines, without one that was torn at the end."""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines() if line.strip()]


def row_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result by flat names: {"a": {"b": 1}} is {"a/b": 1}; without the configuration, as in Ray Tune."""
    return joined({name: value for name, value in result.items() if name != "config"})


class Table:
    """Rows of CSV whose columns are found as they come.

    Attributes:
        columns: their names; () before the first row.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.columns = tuple(columns)

    def text(self, rows: Iterable[Mapping[str, Any]], *, header: bool) -> str:
        """Rows as text; a row has nothing where it has no value.

        Args:
            rows: by flat names, none of which is new.
            header: whether the names come first.
        """
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        if header and self.columns:
            table.writerow(self.columns)
        table.writerows([[row.get(name, "") for name in self.columns] for row in rows])
        return text.getvalue()

    def widen(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Take in the names of new rows; whether there were any new ones."""
        names = dict.fromkeys(self.columns)
        for row in rows:
            names.update(dict.fromkeys(row))
        wider = len(names) > len(self.columns)
        self.columns = tuple(names)
        return wider

    @staticmethod
    def parse(text: str) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and rows of a file, without a row that was torn at the end."""
        whole = text.rpartition("\n")[0]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        rows = list(reader)
        return list(reader.fieldnames or ()), rows
