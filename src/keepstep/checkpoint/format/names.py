"""Names of a checkpoint's files: its own, and those of a directory that the user handed over."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

__all__ = ["HANDED_OVER", "directories_within", "is_handed_over", "parents_of", "problem_of_name"]

HANDED_OVER: Final = "files"
"""The directory of a checkpoint that holds what the user handed over."""

_OWN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,250}\Z")
_MOST_BYTES: Final = 1024
"""Of a whole name: what every file system and bucket takes."""
_MOST_PART_BYTES: Final = 255


def is_handed_over(name: str) -> bool:
    """Whether a file (or directory) is one that the user handed over."""
    return name.startswith(f"{HANDED_OVER}/")


def problem_of_name(name: str) -> str | None:
    """What is wrong with the name of a file, or of a directory of the user's; None: nothing.

    A file of keepstep's own has a plain name; one of the user's is `files/` and a path of names as a file
    system may hold them, in UTF-8, without control characters, of at most 1024 bytes.
    """
    if not is_handed_over(name):
        if _OWN_NAME.match(name) and name != HANDED_OVER:
            return None
        return (
            "one name in this directory, of letters, digits and ._+=@-, or a path below files/ is expected "
            "(no absolute path, no '..')"
        )
    try:
        parts = [part.encode() for part in name.split("/")]
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if any(part in (b"", b".", b"..") for part in parts):
        return "it has an empty part, '.' or '..'"
    if any(unicodedata.category(character) == "Cc" for character in name):
        return "it has a control character"
    if any(len(part) > _MOST_PART_BYTES for part in parts):
        return f"a part of it has more than {_MOST_PART_BYTES} bytes"
    whole = len(b"/".join(parts))
    return f"it has {whole} bytes; allowed: {_MOST_BYTES}" if whole > _MOST_BYTES else None


def parents_of(name: str) -> list[str]:
    """The directories that lead to a name, the outermost first: "files/a/b" lies in "files" and "files/a"."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def directories_within(files: Iterable[str], directories: Iterable[str]) -> list[str]:
    """All directories that a checkpoint has, each before those within it.

    Args:
        files: the names of its files.
        directories: of its empty directories.
    """
    listed = set(directories)
    deepest = {name.rpartition("/")[0] for name in files if "/" in name} | listed
    return sorted(deepest.union(*map(parents_of, deepest)))
