"""What the environment says of buckets: secrets to hide, and what obstore does not read.

That is profiles of AWS; for Azure connection strings, and the names of the command line `az`. obstore takes
everything else from the environment by itself.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keepstep.errors import UsageError

__all__ = [
    "allows_http",
    "credentials_of_profile",
    "has_credentials",
    "secrets_in_environment",
    "settings_of_azure",
]

_TAKEN = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}

_SECRET = re.compile(r"(AWS|AZURE|GOOGLE)_.*(SECRET|KEY|TOKEN|PASSWORD|SAS|CONNECTION_STRING)")
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)
_ALLOWED = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
_SAYS_WHICH_ACCOUNT = re.compile(r"(azure_storage_)?(account_name|use_emulator)", re.IGNORECASE)
_OBSTORES_OF_AZURE = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR")
_NAMES_OF_AZ = {"AZURE_STORAGE_ACCOUNT": "account_name", "AZURE_STORAGE_KEY": "account_key"}
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def secrets_in_environment() -> list[str]:
    """Values that no message may show."""
    values = {name: value for name, value in os.environ.items() if _SECRET.match(name)}
    told = _parts_of(values.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    return [*values.values(), *(told[name] for name in _SECRET_PARTS if name in told)]


def has_credentials() -> bool:
    """Whether AWS credentials come from the environment."""
    return any(name in os.environ for name in _CREDENTIALS)


def allows_http() -> bool:
    """Whether the environment names a server without encryption, or allows one."""
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    return plain or any(os.environ.get(name, "").lower() in ("1", "true") for name in _ALLOWED)


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


_SECRET_PARTS = ("accountkey", "sharedaccesssignature")


def settings_of_azure(options: Mapping[str, Any]) -> dict[str, str]:
    """What a connection string, or the environment in the names of `az`, says of the account.

    Args:
        options: what the caller said. If that names an account, nothing else is looked at.

    Returns:
        In obstore's names.

    Raises:
        UsageError: it is no connection string. The message shows nothing of it.
    """
    if any(_SAYS_WHICH_ACCOUNT.fullmatch(name) for name in options):
        return {}
    text = options.get("connection_string") or os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    if text:
        return _settings_in(str(text))
    if any(name in os.environ for name in _OBSTORES_OF_AZURE):
        return {}
    return {ours: os.environ[theirs] for theirs, ours in _NAMES_OF_AZ.items() if os.environ.get(theirs)}


def _parts_of(text: str) -> dict[str, str]:
    """The parts of a connection string, by their names in small letters."""
    parts = (part.partition("=") for part in text.split(";"))
    return {name.strip().lower(): value.strip() for name, _, value in parts if value.strip()}


def _settings_in(text: str) -> dict[str, str]:
    parts = _parts_of(text)
    if parts.get("usedevelopmentstorage", "").lower() == "true":
        return {"use_emulator": "true"}
    endpoint = parts.get("blobendpoint", "").rstrip("/")
    account = parts.get("accountname") or (urlsplit(endpoint).hostname or "").partition(".")[0]
    if not account:
        raise UsageError(
            "an Azure connection string (AZURE_STORAGE_CONNECTION_STRING, or connection_string in "
            "storage_options) names no account: it needs AccountName=..., or BlobEndpoint=https://ACCOUNT..."
        )
    suffix = parts.get("endpointsuffix")
    if not endpoint and suffix:
        endpoint = f"{parts.get('defaultendpointsprotocol', 'https')}://{account}.blob.{suffix}"
    said = {
        "account_name": account,
        "account_key": parts.get("accountkey", ""),
        "sas_token": parts.get("sharedaccesssignature", "").removeprefix("?"),
        "endpoint": endpoint,
    }
    return {name: value for name, value in said.items() if value}
