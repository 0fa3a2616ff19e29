"""AWS profiles: credentials from `~/.aws/credentials` and `~/.aws/config`, which obstore does not read."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

from keepstep.errors import UsageError

__all__ = ["credentials_of_profile"]

_TAKEN = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


def credentials_of_profile(profile: str | None) -> dict[str, str]:
    """What the files say of a profile, in obstore's names; nothing if there are no files.

    Args:
        profile: its name; None takes AWS_PROFILE, else "default".

    Raises:
        UsageError: a profile was asked for, and there is none of that name.
    """
    asked = profile or os.environ.get("AWS_PROFILE")
    name = asked or "default"
    home = Path("~/.aws").expanduser()
    places = (
        (os.environ.get("AWS_CONFIG_FILE") or home / "config", f"profile {name}"),
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials", name),
    )
    found: dict[str, str] = {}
    for path, section in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except configparser.Error:
            raise UsageError(f"{path} can't be parsed; repair it, or pass storage_options") from None
        for candidate in (section, name):
            if parser.has_section(candidate):
                said = dict(parser.items(candidate))
                found |= {ours: said[theirs] for theirs, ours in _TAKEN.items() if theirs in said}
                break
    if asked and not found:
        raise UsageError(
            f"there is no AWS profile {asked!r} in {places[1][0]} or {places[0][0]}; check profile (or "
            "AWS_PROFILE), or pass access_key_id and secret_access_key"
        )
    return found
