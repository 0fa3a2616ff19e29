"""Google Cloud Storage's part of the servers: its XML API as documented, in a process that can be killed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.buckets.server import Server, free_ports

PROGRAM = Path(__file__).with_name("gcs_process.py")


class GcsServer(Server):
    root = "gs://tests"
    secret = "token-never-in-a-log-5f1c"
    secret_option = "bearer_token"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self.port,) = free_ports(1)

    def options(self, *, endpoint: str | None = None, **more: Any) -> dict[str, Any]:
        return {"base_url": endpoint or self.endpoint, self.secret_option: self.secret, **more}

    def variables(self) -> dict[str, str]:
        return {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": self.secret}

    def make_bucket(self) -> None:
        """It has one."""

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAM), str(self.port), str(self.directory / "data"), self.secret]
