"""What the environment says of buckets: secrets to hide, and AWS profiles, which obstore does not read.

obstore takes everything else from the environment by itself.
"""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path

from keepstep.errors import UsageError

__all__ = ["allows_http", "credentials_of_profile", "has_credentials", "secrets_in_environment"]

_TAKEN = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}

_SECRET = re.compile(r"(AWS|AZURE|GOOGLE)_.*(SECRET|KEY|TOKEN|PASSWORD|SAS)")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def secrets_in_environment() -> list[str]:
    """Values that no message may show."""
    return [value for name, value in os.environ.items() if _SECRET.match(name)]


def has_credentials() -> bool:
    """Whether AWS credentials come from the environment."""
    return any(name in os.environ for name in _CREDENTIALS)


def allows_http() -> bool:
    """Whether the environment names a server without encryption, or allows one."""
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    return plain or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


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
