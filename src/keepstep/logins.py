"""Logins in addresses, which nobody is to read in a message or a manifest."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["without_logins"]

_LOGIN: Final = re.compile(
    r"(?<=://)[^/\s@:]*:[^/\s@]*@"
    # Without a password it is a token, but for a container of Azure and for who logs in with a key.
    r"|(?<=://)(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)(?<!ssh://)[^/\s@:?#]+@"
)


def without_logins(text: str) -> str:
    """The text with `***` for each `user:password` and each token in front of a host.

    Args:
        text: with any number of addresses.
    """
    return _LOGIN.sub("***@", text)
