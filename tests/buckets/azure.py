"""Azure's part of the servers: Azurite, Microsoft's emulator, which needs node and comes from npm."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import shutil
import subprocess
import urllib.error
import urllib.request
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from tests.buckets.server import Server, free_ports

ACCOUNT = "keepsteptest"


class AzureServer(Server):
    root = "az://tests"
    secret = base64.b64encode(b"never in a log 5f1c").decode()
    secret_option = "account_key"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self.port,) = free_ports(1)

    def options(self, *, endpoint: str | None = None, **more: Any) -> dict[str, Any]:
        where = f"{endpoint or self.endpoint}/{ACCOUNT}"
        return {"endpoint": where, "account_name": ACCOUNT, self.secret_option: self.secret, **more}

    def variables(self) -> dict[str, str]:
        parts = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": ACCOUNT,
            "AccountKey": self.secret,
            "BlobEndpoint": f"{self.endpoint}/{ACCOUNT}",
        }
        text = ";".join(f"{name}={value}" for name, value in parts.items())
        return {
            "AZURE_STORAGE_CONNECTION_STRING": text,
            "AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.secret}",
        }

    def command(self) -> list[str]:
        azurite = shutil.which("azurite-blob")
        if azurite is None:
            pytest.skip("azurite-blob is not on PATH: `npm install -g azurite` (needs node)")
        where = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.directory)]
        return [azurite, *where, "--silent", "--disableTelemetry", "--skipApiVersionCheck"]

    def kill(self) -> None:
        """SIGTERM: Azurite writes its index every few seconds only, and at its end.

        What it has confirmed since then would be lost with it, which no real account does.
        """
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        super().kill()

    def make_bucket(self) -> None:
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        said = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
        # The method, eleven standard headers of which none is set, x-ms-..., the resource and its query.
        to_sign = f"PUT{12 * chr(10)}{said}/{ACCOUNT}/{ACCOUNT}/tests\nrestype:container"
        key = base64.b64decode(self.secret)
        signature = base64.b64encode(hmac.new(key, to_sign.encode(), hashlib.sha256).digest()).decode()
        request = urllib.request.Request(
            f"{self.endpoint}/{ACCOUNT}/tests?restype=container",
            method="PUT",
            data=b"",
            headers={**headers, "Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Type": ""},
        )
        try:
            urllib.request.urlopen(request, timeout=10)
        except urllib.error.HTTPError as error:
            assert error.code == 409, error.read()  # noqa: PT017 - it is there
