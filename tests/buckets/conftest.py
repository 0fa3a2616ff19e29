"""One S3 server a test process, started when the first test asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import obstore
import pytest
from tests.buckets.server import Server

from keepstep import Store
from keepstep.checkpoint.place.objects import Objects

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("weed") / "server")
    server.start()
    # A bucket is made by whoever owns it; this server makes one with its first object.
    obstore.put(Objects.open("s3://tests/made", server.options())._store, "by-the-owner", bytes(1 << 20))
    yield server
    server.kill()


@pytest.fixture
def address() -> str:
    """A prefix of its own in one bucket."""
    return f"s3://tests/run-{next(_numbers)}"


@pytest.fixture
def bucket_store(server: Server, address: str) -> Callable[..., Store]:
    """Opens stores of one address."""

    def open_store(**more: Any) -> Store:
        return Store(address, storage_options=server.options(), **more)

    return open_store
