"""`keepstep ls`, `show` and `verify` at the address of a bucket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import obstore
from tests.buckets.server import SECRET_KEY, Server
from tests.buckets.test_store import raw, state

from keepstep import Store


def keepstep(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from keepstep.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=server.environment(),
    )


def test_looking_at_a_bucket(server: Server, address: str, bucket_store: Callable[..., Store]) -> None:
    store = bucket_store()
    for number in range(2):
        store.save(state(number), step=number, metrics={"loss": 1.0 - number})
    listed = json.loads(keepstep(server, "ls", "--json", address).stdout)
    assert listed["path"] == address
    assert [entry["name"] for entry in listed["checkpoints"]] == ["checkpoint_0", "checkpoint_1"]
    assert {entry["health"] for entry in listed["checkpoints"]} == {"ok"}
    assert listed["bytes_free"] is None
    assert 0 < listed["bytes_on_disk"] < sum(entry["bytes"] for entry in listed["checkpoints"])
    shown = json.loads(keepstep(server, "show", "--json", f"{address}/checkpoint_1").stdout)
    assert (shown["step"], shown["health"]) == (1, "ok")
    assert {group["name"] for group in shown["groups"]} == {"model", "base"}
    assert "2 checkpoints sound, 0 damaged" in keepstep(server, "verify", address).stdout

    obstore.delete(raw(store), "checkpoint_1/model.safetensors")
    damaged = keepstep(server, "verify", "--quick", address)
    assert damaged.returncode == 1
    assert "model.safetensors" in damaged.stdout
    nothing = keepstep(server, "ls", f"{address}-none")
    assert nothing.returncode == 2
    assert "there is no checkpoint at" in nothing.stderr
    assert SECRET_KEY not in damaged.stdout + nothing.stderr


def test_a_project_in_a_bucket(server: Server, address: str) -> None:
    Store(f"{address}/checkpoints", storage_options=server.options()).save(state(0), step=5)
    assert "checkpoint_0" in keepstep(server, "ls", address).stdout
