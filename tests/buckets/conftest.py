"""One server of each kind a test process, started when the first test asks for it.

What a store in a bucket promises is tested on each kind: on S3 always, on Google Cloud Storage in part, and
the rest, Azure with it, with `-m soak`. A test that is parametrized by `server` itself says on which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.buckets.azure import AzureServer
from tests.buckets.gcs import GcsServer
from tests.buckets.server import S3Server, Server

from keepstep import Store

KINDS: dict[str, type[Server]] = {"s3": S3Server, "gcs": GcsServer, "azure": AzureServer}
ON_EACH_KIND = ("test_store", "test_mirror", "test_mirror_faults", "test_faults", "test_ranks", "test_dcp")
_QUICK = {"s3": ON_EACH_KIND, "gcs": ("test_store",), "azure": ()}
_numbers = itertools.count()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    said = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if module in ON_EACH_KIND and "server" in metafunc.fixturenames and "server" not in said:
        kinds = [
            pytest.param(kind, marks=() if module in _QUICK[kind] else pytest.mark.soak) for kind in KINDS
        ]
        metafunc.parametrize("server", kinds, indirect=True)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """The server of a kind."""
    started: dict[str, Server] = {}

    def of_kind(kind: str) -> Server:
        if kind not in started:
            server = KINDS[kind](tmp_path_factory.mktemp(kind) / "server")
            try:
                server.start()
                server.make_bucket()
            except BaseException:
                server.kill()
                raise
            started[kind] = server
        return started[kind]

    yield of_kind
    for server in started.values():
        server.kill()


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Server:
    return servers(getattr(request, "param", "s3"))


@pytest.fixture
def s3(servers: Callable[[str], Server]) -> Server:
    """For what is so with S3 alone."""
    return servers("s3")


@pytest.fixture
def address(server: Server) -> str:
    """A prefix of its own in one bucket."""
    return f"{server.root}/run-{next(_numbers)}"


@pytest.fixture
def bucket_store(server: Server, address: str) -> Callable[..., Store]:
    """Opens stores of one address."""

    def open_store(**more: Any) -> Store:
        return Store(address, storage_options=server.options(), **more)

    return open_store
