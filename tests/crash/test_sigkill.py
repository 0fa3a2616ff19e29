"""Real processes, really killed, at instants that nobody chose."""

from __future__ import annotations

import json
import os
import random
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.crash.harness import leftovers
from tests.crash.tally import Tally, draw_seed
from tests.crash.tally import rounds as scaled
from tests.forked import Forked, run_program, start_program

from keepstep.checkpoint.store import Store

TRAIN = textwrap.dedent(
    """
    import sys
    import torch
    torch.set_num_threads(1)
    from keepstep.checkpoint.keeping.retention import Retention
    from keepstep.checkpoint.engine import save_directory
    from keepstep.checkpoint.store import Store
    from tests.crash.test_sigkill import state

    root, how, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store = Store(root, retention=Retention(keep_last=3))
    live = state(0)
    taken = store.load_latest_into(live)
    step = live["train"]["step"] if taken else 0
    print("ready", step, flush=True)
    for step in range(step + 1, step + 1 + steps):
        if how == "background":
            store.save_in_background(state(step), step=step)
            done = step - 1
        else:
            store.save(state(step), step=step)
            done = step
        print("durable", done, flush=True)
    """
)


def state(number: int) -> dict[str, object]:
    weights = torch.arange(60_000, dtype=torch.float32) * (number + 1)
    return {
        "model": {"w": weights, "tied": weights, "b": torch.full((7,), float(number))},
        "optimizer": {"m": torch.full((30_000,), number, dtype=torch.int64)},
        "train": {"step": number},
    }


def start(root: Path, how: str, steps: int = 10_000) -> Forked:
    return start_program(TRAIN, root, how, steps)


def kill_in_the_middle(root: Path, how: str, after_s: float) -> tuple[int, str]:
    """The last step that the killed process said was durable."""
    process = start(root, how)
    first = process.stdout.readline()
    assert first.startswith("ready"), first + process.stdout.read()
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, out
    # The kill may cut the last line off.
    lines = [
        line for line in out.splitlines(keepends=True) if line.startswith("durable ") and line.endswith("\n")
    ]
    return int(lines[-1].split()[1]) if lines else int(first.split()[1]), first


def rounds(root: Path, how: str, count: int, tally: Tally) -> None:
    seed = draw_seed()
    draw = random.Random(seed)
    for number in range(count):
        durable, first = kill_in_the_middle(root, how, draw.uniform(0.0, 0.12))
        store = Store(root)
        newest = store.latest()
        found = -1 if newest is None else newest.step
        assert found is not None
        if durable > 0:
            assert found >= durable, f"round {number}: {durable} was durable, {found} is there ({first})"
        for checkpoint in store.list():
            assert checkpoint.verify().sound
            assert checkpoint.step is not None
            assert_same(checkpoint.load(), state(checkpoint.step))
    tally(f"random kills: whole processes, {how}", count)
    finished = start(root, how, steps=2)
    said, _ = finished.communicate()
    assert finished.returncode == 0, said
    assert leftovers(root) == []
    assert Store(root).latest() is not None


@pytest.mark.parametrize("how", ["save", "background"])
def test_killed_at_random_instants(tmp_path: Path, how: str, tally: Tally) -> None:
    rounds(tmp_path, how, 2, tally)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["save", "background"])
def test_killed_again_and_again(tmp_path: Path, how: str, tally: Tally) -> None:
    rounds(tmp_path, how, scaled(30), tally)


FORKED = """
import os, sys, random, time
import torch
torch.set_num_threads(1)
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.store import Store
from tests.crash.test_sigkill import state

root, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
for number in range(rounds):
    instant = draw.uniform(0.0, 0.05)
    child = os.fork()
    if child == 0:
        store = Store(root, retention=Retention(keep_last=2))
        newest = store.latest()
        step = newest.step + 1 if newest else 1
        while True:
            (store.save_in_background if number % 2 else store.save)(state(step), step=step)
            step += 1
    time.sleep(instant)
    os.kill(child, 9)
    os.waitpid(child, 0)
    newest = Store(root).latest()
    if newest is not None:
        report = newest.verify()
        assert report.sound, (seed, number, report.problems)
print("sound")
"""


def fork_rounds(root: Path, count: int, tally: Tally) -> None:
    """Children of a warm process: dozens of kills a second, most of them within a save."""
    seed = draw_seed()
    done = run_program(FORKED, root, seed, count, timeout_s=3600)
    assert done.returncode == 0, done.stdout
    tally("random kills: forked children", count)
    Store(root).save(state(1))
    assert leftovers(root) == []


def test_thirty_kills_of_forked_children(tmp_path: Path, tally: Tally) -> None:
    fork_rounds(tmp_path, 30, tally)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_hundreds_of_kills_of_forked_children(tmp_path: Path, tally: Tally) -> None:
    fork_rounds(tmp_path, scaled(500), tally)


def test_a_background_save_is_finished_when_the_process_ends(tmp_path: Path) -> None:
    done = start(tmp_path, "background", steps=1)
    said, _ = done.communicate()
    assert done.returncode == 0, said
    newest = Store(tmp_path).latest()
    assert newest is not None
    assert newest.step == 1
    assert_same(newest.load(), state(1))


def test_two_processes_on_one_store(tmp_path: Path) -> None:
    first = start(tmp_path, "save")
    while not first.stdout.readline().startswith("durable"):
        pass
    second = start(tmp_path, "save", steps=1)
    said, _ = second.communicate()
    assert second.returncode != 0
    assert "StoreBusyError" in said
    holder = json.loads((tmp_path / ".keepstep" / "lock").read_text())
    assert holder["pid"] == first.pid
    assert f"being written to by process {first.pid} on " in said
    assert "give this run another directory" in said
    assert first.poll() is None, "the one that was there first is not disturbed"
    newest = Store(tmp_path).latest()
    assert newest is not None, "reading needs no lock"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = start(tmp_path, "save", steps=1)  # the lock goes with its holder
    said, _ = third.communicate()
    assert third.returncode == 0, said


def test_data_loader_workers_that_outlive_their_run_keep_nobody_out(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, sys, time
        from keepstep.checkpoint.store import Store
        store = Store(sys.argv[1])
        store.save({"x": 1})
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        print("saved", flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    run = start_program(code, tmp_path, start_new_session=True)
    assert run.stdout.readline() == "saved\n"
    run.wait()
    try:
        assert Store(tmp_path).save({"x": 2}).name == "checkpoint_1"
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
