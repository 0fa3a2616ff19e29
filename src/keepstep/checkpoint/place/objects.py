"""obstore, behind the few calls that a bucket needs, with errors in words and without secrets.

The only module that imports obstore; `registry.py` imports it when an address asks for it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotSupportedError
from obstore.store import MemoryStore, ObjectStore, from_url

from keepstep.checkpoint.place.profile import (
    allows_http,
    credentials_of_profile,
    has_credentials,
    secrets_in_environment,
    settings_of_azure,
)
from keepstep.checkpoint.place.refusals import in_words, in_words_at_opening, says_no_bucket, status_of
from keepstep.errors import BucketError, UsageError
from keepstep.logins import without_logins

__all__ = ["DEFAULTS", "Found", "Objects"]

DEFAULTS: Final[Mapping[str, float]] = {
    "timeout_s": 60.0,
    "connect_timeout_s": 5.0,
    "max_retries": 10,
    "retry_timeout_s": 120.0,
}
"""One request, its connection, how often it is tried again, and for how long in all."""

PART_BYTES: Final = 8 << 20
_PARTS_AT_ONCE: Final = 4
_UNANSWERED: Final = "error sending request"
_SECRET = re.compile(r"secret|key|token|password|sas|credential|connection_string", re.IGNORECASE)
_QUERY = re.compile(r"(?<=[\w/])\?[^\s\"'<>]*")
_AWS = ("s3://", "s3a://")
_AZURE = ("az://", "azure://", "abfs://", "abfss://")
_KEYS = {"access_key_id", "aws_access_key_id", "skip_signature", "aws_skip_signature", "credential_provider"}
_ALLOW = re.compile(r"(aws_|azure_|google_)?allow_http")
_users: set[int] = set()
"""Processes that made requests, ancestors by fork included."""
_ENDPOINTS = (
    *("endpoint", "aws_endpoint", "endpoint_url", "aws_endpoint_url"),
    *("azure_endpoint", "azure_storage_endpoint", "base_url", "google_base_url"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An object in a listing.

    Attributes:
        key: relative to the store.
        bytes: its size.
        modified: by the server's clock.
        tag: changes with its content.
    """

    key: str
    bytes: int
    modified: datetime
    tag: str


class Objects:
    """The objects below one prefix of a bucket.

    Args:
        store: of obstore.
        address: to name it in messages.
        secrets: texts that no message may show.
        max_retries: of a request that got no answer.
        retry_timeout_s: for all of them together.
    """

    def __init__(
        self,
        store: ObjectStore,
        address: str,
        secrets: Iterable[str] = (),
        *,
        max_retries: int = 10,
        retry_timeout_s: float = 120.0,
    ) -> None:
        self.address = address
        self._max_retries = max_retries
        self._retry_timeout_s = retry_timeout_s
        self._store = store
        self._in_memory = isinstance(store, MemoryStore)
        self._secrets = sorted({secret for secret in secrets if len(secret) > 3}, key=len, reverse=True)

    @classmethod
    def open(cls, address: str, options: Mapping[str, Any]) -> Objects:
        """Connect to nothing yet; say where and how.

        Raises:
            UsageError: obstore does not know an option, or the address.
        """
        limits = _limits(options)
        config = {key: value for key, value in options.items() if key not in DEFAULTS}
        profile = config.pop("profile", None)
        client = {
            "timeout": timedelta(seconds=limits["timeout_s"]),
            "connect_timeout": timedelta(seconds=limits["connect_timeout_s"]),
            **config.pop("client_options", {}),
        }
        retry: Any = {
            "max_retries": limits["max_retries"],
            "retry_timeout": timedelta(seconds=limits["retry_timeout_s"]),
            "backoff": {"max_backoff": timedelta(seconds=5)},
        }
        try:
            config = _with_account(address, config, profile)
            client.setdefault("allow_http", _takes_plain_http(address, config))
            store = from_url(address, client_options=client, retry_config=retry, **config)  # type: ignore[call-overload]
        except (BaseError, TypeError, ValueError) as error:
            hidden = _hidden(str(error), [str(value) for value in config.values()])
            raise UsageError(in_words_at_opening(address, hidden)) from None
        secrets = [str(value) for key, value in config.items() if _SECRET.search(key)]
        headers = dict(client.get("default_headers") or {})
        secrets += [str(client.get("proxy_url", "")), *map(str, headers.values())]
        return cls(
            store,
            address,
            [*secrets, *secrets_in_environment()],
            max_retries=limits["max_retries"],
            retry_timeout_s=limits["retry_timeout_s"],
        )

    def __repr__(self) -> str:
        return f"Objects({self.address!r})"

    # -------------------------------------------------------------------------------------- reads

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[Found]:
        """Every object below `prefix`, a whole number of path segments; in no order.

        Args:
            prefix: of their keys.
            after: only those whose key is greater.
        """
        with self._explained("list", f"{prefix}/*" if prefix else "*"):
            for batch in obstore.list(self._store, prefix or None, offset=after, chunk_size=1000):
                for meta in batch:
                    yield Found(
                        key=meta["path"],
                        bytes=meta["size"],
                        modified=meta["last_modified"],
                        tag=meta["e_tag"] or meta["version"] or "",
                    )

    def size(self, key: str) -> int | None:
        """Size of an object, None if there is none."""
        try:
            with self._explained("look at", key):
                return obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            return None

    def get(self, key: str) -> bytes:
        """A small object, whole.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._explained("read", key):
            return bytes(obstore.get(self._store, key).bytes())

    def read_into(self, key: str, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` of an object; return how many bytes there were."""
        with self._explained("read", key):
            data = memoryview(obstore.get_range(self._store, key, start=offset, length=len(view)))
        view[: len(data)] = data
        return len(data)

    # ------------------------------------------------------------------------------------- writes

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write a small object in one request; it may replace another."""
        with self._explained("write", key):
            obstore.put(self._store, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object if there is none of that key; False if there is.

        Raises:
            BucketError: it failed; whether the object is there is not known.
        """
        with self._explained("create", key):
            for pause_s in self._pauses():
                try:
                    obstore.put(self._store, key, data, mode="create", use_multipart=False)
                except AlreadyExistsError:
                    return False
                except NotSupportedError as error:
                    raise self.refuses_create(key) from error
                except GenericError as error:
                    # obstore does not repeat this; whoever hears False afterwards looks what is there.
                    if pause_s is None or _UNANSWERED not in str(error):
                        raise
                    time.sleep(pause_s)
                else:
                    break
        return True

    def _pauses(self) -> Iterator[float | None]:
        """How long to wait after each failure; None after the last."""
        deadline_s = time.monotonic() + self._retry_timeout_s
        for attempt in range(self._max_retries):
            if time.monotonic() > deadline_s:
                break
            yield min(0.1 * 2**attempt, 5.0)
        yield None

    def refuses_create(self, key: str) -> BucketError:
        """The error of a server that can't write an object only if there is none."""
        return BucketError(
            f"{self.address}: the server refuses, or ignores, create-only puts (If-None-Match: *), which the "
            f"commit of a checkpoint needs (seen on {key}). Nothing was committed. Use a server that has "
            "them (S3, GCS, Azure, recent MinIO, SeaweedFS, Ceph), or save to a directory"
        )

    def upload(self, key: str, parts: Iterable[memoryview]) -> None:
        """Write a large object in parts of `PART_BYTES`; none of it is visible before all is there."""
        with self._explained("write", key):
            # Memory would hold on to the parts, which are used again, until all are there.
            taken = map(_copied, parts) if self._in_memory else iter(parts)
            obstore.put(
                self._store,
                key,
                taken,
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already don't matter."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError), self._explained("delete", key):
                obstore.delete(self._store, key)

    # ------------------------------------------------------------------------------------- errors

    @contextlib.contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        self._check_fork()
        try:
            yield
        except FileNotFoundError as error:  # obstore's own NotFoundError is not what it raises
            if says_no_bucket(said := _hidden(str(error), self._secrets)):
                raise BucketError(in_words(self.address, f"{doing} {key}", said)) from None
            raise FileNotFoundError(
                errno.ENOENT, os.strerror(errno.ENOENT), f"{self.address}/{key}"
            ) from None
        except BaseError as error:
            said = _hidden(str(error), self._secrets)
            if doing == "create" and status_of(said) == "501":
                raise self.refuses_create(key) from None
            # Not chained: the text of the cause may show a signature.
            raise BucketError(in_words(self.address, f"{doing} {key}", said)) from None

    def _check_fork(self) -> None:
        """Obstore's threads are not there after a fork: a request would wait for ever."""
        me = os.getpid()
        if not self._in_memory and _users - {me}:
            raise BucketError(
                f"{self.address} can't be used in process {me}: it was forked from one that had used a "
                "bucket before, and the client's threads stayed there. Start processes by 'spawn' or "
                "'forkserver', or fork before the first use"
            )
        _users.add(me)


def _with_account(address: str, config: dict[str, Any], profile: str | None) -> dict[str, Any]:
    """The settings, and what keepstep reads in obstore's stead of whose account it is."""
    if address.startswith(_AWS) and (profile or not (_KEYS & config.keys() or has_credentials())):
        return {**credentials_of_profile(profile), **config}
    if address.startswith(_AZURE) and "@" not in address:
        config = {**settings_of_azure(config), **config}
        config.pop("connection_string", None)
    return config


def _takes_plain_http(address: str, config: dict[str, Any]) -> bool:
    """Whether requests may go unencrypted: to a server that was named so, or if that is allowed outright.

    Takes `allow_http` out of the settings: to obstore it is one of the client's.
    """
    said = [config.pop(name) for name in list(config) if _ALLOW.fullmatch(name)]
    if said:
        return str(said[-1]).lower() in ("1", "true")
    plain = any(str(config.get(name, "")).startswith("http://") for name in _ENDPOINTS)
    # A server of GCS may be named in the file of a service account, which obstore reads.
    return plain or address.startswith("gs://") or allows_http()


def _copied(part: memoryview) -> memoryview:
    return memoryview(bytes(part))


def _limits(options: Mapping[str, Any]) -> dict[str, Any]:
    limits = {name: options.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in limits.items():
        whole = name == "max_retries"
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not (value >= 0 if whole else 0 < value < math.inf):
            allowed = "a whole number of at least 0" if whole else "more than 0 seconds"
            raise UsageError(f"storage_options {name} is {value!r}; expected {allowed}")
    return limits


def _hidden(text: str, secrets: Iterable[str]) -> str:
    """An error's first line without secrets and without what follows a `?`."""
    for secret in secrets:
        if len(secret) > 3:
            text = text.replace(secret, "***")
    text = without_logins(text)
    lines = _QUERY.sub("?***", text).split("\n\n")[0].replace("\n", " ").strip()
    return lines if len(lines) <= 1000 else f"{lines[:1000]}..."
