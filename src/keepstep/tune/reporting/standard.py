"""Standard output, for lines that hold any character."""

from __future__ import annotations

import sys

__all__ = ["write_out"]


def write_out(text: str) -> None:
    """Write whole lines; a character that the output's encoding lacks comes out as its escape.

    Raises:
        OSError: they can't be written.
    """
    out = sys.stdout
    if out is None:
        return
    try:
        out.write(text)
    except UnicodeEncodeError:
        out.write(text.encode(out.encoding, "backslashreplace").decode(out.encoding))
    out.flush()
