"""Stores that become the writer where `dcp.save` is at work, or was when its process died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from tests.buckets.server import Server
from tests.buckets.test_store import keys, state

from keepstep import Store

Open = Callable[..., Store]

PROGRAM = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint as torch_dcp
import keepstep
from keepstep.checkpoint.place import bucket_named
from keepstep.checkpoint.place.objects import Objects

def fall_out(*said, **more):
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return real(*said, **more)

owner, method = (bucket_named, "_publish") if sys.argv[2] == "decided" else (Objects, "upload")
real = getattr(owner, method)
setattr(owner, method, fall_out)
state = {"a": torch.ones(4), "b": {"w": torch.ones(3 << 20)}}
torch_dcp.save(state, storage_writer=keepstep.dcp.StorageWriter(sys.argv[1]), no_dist=True)
"""


def fallen_out(server: Server, address: str, when: str, how: signal.Signals) -> subprocess.Popen[str]:
    """A process that saves `checkpoint_7`, once it is killed or stopped."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"{address}/checkpoint_7", when, how.name],
        stderr=subprocess.PIPE,
        text=True,
        env={**server.environment(), "OMP_NUM_THREADS": "1"},
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status) or os.WTERMSIG(status) == how
    return process


@pytest.mark.timeout(90)
def test_what_was_decided_and_not_published_is_published(
    server: Server, address: str, bucket_store: Open
) -> None:
    fallen_out(server, address, "decided", signal.SIGKILL)
    store = bucket_store()
    assert store.list() == []
    store.claim()
    (found,) = store.list()
    assert found.name == "checkpoint_7"
    assert found.verify().sound
    assert found.load()["a"].tolist() == [1] * 4
    assert store.save(state(0)).name == "checkpoint_8"


@pytest.mark.timeout(90)
def test_what_a_living_process_of_this_host_is_saving_is_left(
    server: Server, address: str, bucket_store: Open
) -> None:
    process = fallen_out(server, address, "uploading", signal.SIGSTOP)
    store = bucket_store()
    before = keys(store)
    assert store.save(state(0)).name == "checkpoint_8"
    assert before <= keys(store)
    process.send_signal(signal.SIGCONT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_7", "checkpoint_8"]
    assert [report.sound for report in store.verify()] == [True, True]
