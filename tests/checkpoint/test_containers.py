"""Containers that share a host's name, but not the numbers of its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep import Store
from keepstep.checkpoint.place.claimant import parse_claim, this_process

CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
SAYS = """
from keepstep.checkpoint.place.claimant import parse_claim, this_process
import sys

there = parse_claim(sys.stdin.buffer.read())[0]
print(there.is_dead, there.lives_here, there.is_here)
"""


def of_another_container(said: bytes) -> bytes:
    told = json.loads(said)
    return json.dumps({**told, "namespace": told.get("namespace", 0) + 1}).encode()


def test_a_process_of_another_container_is_known_to_live_no_more_than_to_be_dead() -> None:
    who, _ = parse_claim(of_another_container(this_process().dump()))
    assert who is not None
    assert (who.is_dead, who.lives_here, who.is_here) == (False, False, False)


def test_when_the_host_starts_anew_containers_are_gone() -> None:
    told = json.loads(of_another_container(this_process().dump()))
    who, _ = parse_claim(json.dumps({**told, "boot": "an earlier one"}).encode())
    assert who is not None
    assert (who.is_dead, who.lives_here) == (True, False)


def test_a_container_takes_no_process_outside_for_dead() -> None:
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no process have numbers of its own")
    done = subprocess.run(
        [*CONTAINER, sys.executable, "-c", SAYS], input=this_process().dump(), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["False", "False", "False"]


def test_what_another_container_may_be_saving_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    for name in ("fcntl", "flock", "lockf"):
        monkeypatch.setattr(f"keepstep.locks.fcntl.{name}", refuse)
    store, place = Store(tmp_path), tmp_path / ".keepstep" / "lock"
    store.save({"x": 1})
    unfinished = tmp_path / "checkpoint_1.tmp-0123456789ab"
    unfinished.mkdir()
    told = json.loads(of_another_container(place.read_bytes()))
    place.unlink()
    place.write_text(json.dumps({**told, "pid": 1 << 22}))  # no process here has this number
    Store(tmp_path).save({"x": 2})
    assert unfinished.exists()
