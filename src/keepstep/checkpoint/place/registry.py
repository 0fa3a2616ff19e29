"""Addresses of buckets, and the backend that an address asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from keepstep.errors import UsageError

if TYPE_CHECKING:
    from keepstep.checkpoint.place.bucket import BucketBackend, ObjectsLike

__all__ = ["check_scheme", "is_address", "open_bucket", "open_objects"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_SCHEMES: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_ADAPTER: Final = "keepstep.checkpoint.place.objects"
_BACKEND: Final = "keepstep.checkpoint.place.bucket"  # loaded when it is asked for: most runs have no bucket


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant as the address of a bucket ("s3://bucket/run")."""
    if isinstance(path, Path):
        if path.parts and path.parts[0] in {f"{scheme}:" for scheme in _SCHEMES}:
            raise UsageError(f"{path} was an address before it became a Path; pass it as a string")
        return False
    text = os.fspath(path)
    if _SCHEME.match(text) is None and text.partition(":/")[0] in _SCHEMES:
        raise UsageError(
            f"{text} is neither a directory nor an address; did you mean {text.replace(':/', '://', 1)}?"
        )
    return _SCHEME.match(text) is not None


def check_scheme(address: str) -> None:
    """See that an address is of a kind that keepstep knows.

    Raises:
        UsageError: it is not.
    """
    scheme = urlsplit(address).scheme
    if scheme not in _SCHEMES:
        raise UsageError(
            f"{scheme}:// is no kind of bucket that keepstep knows; allowed: "
            f"{', '.join(f'{known}://' for known in _SCHEMES)}, or a directory"
        )


def open_bucket(address: str, options: Mapping[str, Any] | None = None) -> BucketBackend:
    """The backend at an address; connects to nothing yet.

    Raises:
        UsageError: the address is none that keepstep knows, holds credentials, or obstore is missing.
    """
    backend: BucketBackend = import_module(_BACKEND).BucketBackend(open_objects(address, options))
    return backend


def open_objects(address: str, options: Mapping[str, Any] | None = None) -> ObjectsLike:
    """The objects below an address, of any kind; connects to nothing yet.

    Raises:
        UsageError: the address is none that keepstep knows, holds credentials, or obstore is missing.
    """
    clean = address.rstrip("/")
    check_scheme(clean)
    parts = urlsplit(clean)
    secret = "@" in parts.netloc and parts.scheme not in ("abfs", "abfss")
    if secret or parts.query or parts.fragment or not parts.netloc:
        raise UsageError(
            f"the address of a bucket is {parts.scheme}://bucket/prefix and nothing more: no credentials, no "
            "'?' and no '#'. Credentials come from the environment, a profile, or storage_options"
        )
    if options is not None and not isinstance(options, Mapping):  # it may hold a secret, and is not shown
        raise UsageError(
            f"storage_options is a {type(options).__name__}; expected names with values, as "
            '{"endpoint": "https://minio.example.com"}'
        )
    try:
        adapter = import_module(_ADAPTER)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "obstore":
            raise
        raise UsageError(
            f"{clean} needs obstore, which is not installed: pip install 'keepstep[objects]'"
        ) from None
    objects: ObjectsLike = adapter.Objects.open(clean, dict(options or {}))
    return objects
