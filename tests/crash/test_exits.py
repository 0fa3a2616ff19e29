"""Every way in which a process ends while a save is being copied or written."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.crash.harness import leftovers
from tests.crash.tally import Tally, draw_seed, rounds
from tests.forked import run_program

from keepstep.checkpoint.store import Store

# The save stands still at one of its stages until the main thread has ended, or for as long as it is told to.
HELD = """
import os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
from keepstep.checkpoint.saving.staging import TensorBytes
from keepstep.checkpoint.store import Store
from keepstep.files import LocalFiles

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
root, stage = sys.argv[1], sys.argv[2]

held_for_good = sys.argv[3] == "for good"

def hold():
    while held_for_good or threading.main_thread().is_alive():
        time.sleep(0.005)

def train():
    while True:  # a signal that comes just before a long sleep would be heard after it
        time.sleep(0.01)

class Held(LocalFiles):
    def create_segment(self, path, size_bytes, *, durable=True):
        if stage == "writing":
            hold()
        return super().create_segment(path, size_bytes, durable=durable)

    def write_file(self, path, data, *, durable=True):
        if stage == "committing" and path.name == "manifest.json":
            hold()
        if stage == "failing":
            hold()
            raise OSError(5, "the disk is on fire")
        super().write_file(path, data, durable=durable)

real = TensorBytes.copy_into
def copy_into(self, *where):
    if stage == "copying":
        hold()
    real(self, *where)
TensorBytes.copy_into = copy_into

store = Store(root, files=Held())
state = {"model": {"w": torch.arange(50_000.0), "b": torch.ones(3)}, "step": 1}
pending = store.save_in_background(state, step=1, staging="overlapped")
print("saving", flush=True)
"""

STAGES = ["copying", "writing", "committing"]


def start(root: Path, stage: str, ending: str, held: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD + textwrap.dedent(ending), str(root), stage, held],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n", process.communicate()[1]
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=100)
    return process.returncode, said


def assert_committed(root: Path) -> None:
    (checkpoint,) = Store(root).list()
    assert checkpoint.verify().sound
    expected = {"model": {"w": torch.arange(50_000.0), "b": torch.ones(3)}, "step": 1}
    assert_same(checkpoint.load(), expected)
    assert leftovers(root) == []


ENDINGS = {
    "the end of the script": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "an exception": ("raise RuntimeError('training went wrong')", 1, "training went wrong"),
    "an exception in a function that held the state": (
        """
        def train():
            model = {"w": torch.ones(5)}
            raise RuntimeError("training went wrong")
        del state, store, pending
        train()
        """,
        1,
        "training went wrong",
    ),
    "the store dropped": ("del store, pending, state", 0, ""),
}


def crossed(first: Iterable[str]) -> list[Any]:
    """Each of these at each stage; every fourth pair is enough from day to day."""
    pairs = list(itertools.product(first, STAGES))
    return [pytest.param(*pair, marks=[pytest.mark.soak] * (n % 4 != 0)) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize(("ending", "stage"), crossed(ENDINGS))
def test_the_save_in_flight_is_finished(tmp_path: Path, ending: str, stage: str) -> None:
    script, code, words = ENDINGS[ending]
    returned, said = end(start(tmp_path, stage, script))
    assert returned == code, said
    assert words in said
    assert_committed(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_finishes_the_save_in_flight(tmp_path: Path, stage: str) -> None:
    process = start(tmp_path, stage, "train()")
    process.send_signal(signal.SIGINT)
    returned, said = end(process)
    assert returned == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said
    assert_committed(tmp_path)


def test_ctrl_c_while_waiting_for_the_save(tmp_path: Path) -> None:
    process = start(tmp_path, "committing", "store.wait()")
    process.send_signal(signal.SIGINT)
    returned, said = end(process)
    assert returned == -signal.SIGINT, said
    assert_committed(tmp_path)


WAITS = {"for the copy": ("copying", "pending.wait_staged()"), "for the save": ("committing", "store.wait()")}


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_that_does_not_wake_who_waits(tmp_path: Path, wait: str) -> None:
    """As one that comes just before the main thread falls asleep; here another thread takes the signal."""
    stage, call = WAITS[wait]
    ctrl_c = "threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()"
    returned, said = end(start(tmp_path, stage, f"{ctrl_c}\n{call}"))
    assert returned == -signal.SIGINT, said
    assert_committed(tmp_path)


@pytest.mark.parametrize("stage", ["copying", "committing"])
def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing_torn(tmp_path: Path, stage: str) -> None:
    process = start(tmp_path, stage, "train()", held="for good")
    for _ in range(50):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    process.kill()
    process.communicate()
    assert Store(tmp_path).list() == []
    assert Store(tmp_path).save({"x": 1}).verify().sound
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("stage", ["copying", "writing"])
def test_sigterm_by_default_leaves_nothing_torn(tmp_path: Path, stage: str) -> None:
    process = start(tmp_path, stage, "train()")
    process.send_signal(signal.SIGTERM)
    returned, _ = end(process)
    assert returned == -signal.SIGTERM
    assert Store(tmp_path).list() == []
    assert Store(tmp_path).save({"x": 1}).verify().sound
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("ending", ["", "del store, pending"])
def test_a_save_that_fails_after_the_script_says_so(tmp_path: Path, ending: str) -> None:
    _, said = end(start(tmp_path, "failing", ending))
    assert "could not be saved in the background" in said
    assert "the disk is on fire" in said
    assert Store(tmp_path).list() == []


def test_a_slip_that_is_found_after_the_script_says_so(tmp_path: Path) -> None:
    _, said = end(start(tmp_path, "copying", "state['model']['b'].add_(1)"))
    assert "model/b" in said
    assert Store(tmp_path).list() == [], "a torn state was committed"


FORKS = {
    "that ends at once": "os._exit(0)",
    "that ends like a program": "sys.exit(0)",
    "that looks at the save": """
        pending.wait_staged()
        assert pending.done()
        store.wait()
        assert not store.busy
        sys.exit(0)
        """,
    "that loads": """
        assert store.latest() is None
        sys.exit(0)
        """,
}


@pytest.mark.parametrize(("fork", "stage"), crossed(FORKS))
def test_a_fork_while_a_save_is_in_flight(tmp_path: Path, fork: str, stage: str) -> None:
    script = (
        "child = os.fork()\nif child == 0:\n"
        + textwrap.indent(textwrap.dedent(FORKS[fork]), "    ")
        + "\nassert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    returned, said = end(start(tmp_path, stage, script))
    assert returned == 0, said
    assert_committed(tmp_path)


TRAINING_FORK = """
import os, sys, threading
import torch
from keepstep import Accelerator, CheckpointPolicy
from keepstep.checkpoint.saving.staging import TensorBytes

opened = threading.Event()
real = TensorBytes.copy_into
def copy_into(self, *where):
    opened.wait()
    real(self, *where)
TensorBytes.copy_into = copy_into

policy = CheckpointPolicy(every_n_steps=1, staging="overlapped")
accelerator = Accelerator(project_dir=sys.argv[1], checkpoint_policy=policy, cpu=True)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)

def step():
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    optimizer.zero_grad()

step()
assert accelerator.checkpoint() is not None
child = os.fork()
if child == 0:
    step()
    accelerator.wait_for_checkpoint()
    accelerator.end_training()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
opened.set()
accelerator.wait_for_checkpoint()
"""


def test_a_fork_trains_on_while_its_parent_saves(tmp_path: Path) -> None:
    done = run_program(TRAINING_FORK, tmp_path)
    assert done.returncode == 0, done.stdout
    (checkpoint,) = Store(tmp_path / "checkpoints").list()
    assert checkpoint.step == 1
    assert checkpoint.verify().sound


# ------------------------------------------------------------------------------ slips, in real time

SLIPS = """
import random, sys, time
import torch
torch.set_num_threads(1)
from keepstep.checkpoint.store import Store
from keepstep.errors import BackgroundSaveError, StateChangedError

root, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
store = Store(root)
state = {"a": {"w": torch.zeros(3_000_000)}, "b": {"w": torch.zeros(500_000), "v": torch.zeros(7)}}
other = torch.rand(100, 100)
flat = [t for group in state.values() for t in group.values()]
base = flat[1].view(1000, 500)
writes = [
    lambda t, n: t.fill_(n),
    lambda t, n: t.view(-1)[-3:].fill_(n),
    lambda t, n: t.add_(1),
    lambda t, n: base.t()[3].fill_(n),
    lambda t, n: t.copy_(torch.full_like(t, n)),
]
caught = whole = 0
for number in range(1, rounds + 1):
    before = [t.clone() for t in flat]
    pending = store.save_in_background(state, staging="overlapped")
    ends = time.monotonic() + draw.choice([0.0, 0.001, 0.005, 0.02, 0.05, 0.2]) * draw.random()
    while time.monotonic() < ends:  # as a forward does: in many places, none of which writes to the state
        y = other @ other
        y = torch.relu(y).sum()
    draw.choice(writes)(draw.choice(flat), float(number))  # without wait_staged
    try:
        checkpoint = pending.wait()
    except BackgroundSaveError as error:
        assert isinstance(error.__cause__, StateChangedError), (seed, number, error)
        caught += 1
        continue
    whole += 1
    loaded = checkpoint.load()
    held = [t for group in loaded.values() for t in group.values()]
    assert all(torch.equal(a, b) for a, b in zip(held, before)), (seed, number, "torn")
    store.delete(checkpoint)
print(caught, whole)
"""


def slips(root: Path, tally: Tally, count: int) -> None:
    done = run_program(SLIPS, root, draw_seed(), rounds(count), timeout_s=3600)
    assert done.returncode == 0, done.stdout
    caught, whole = map(int, done.stdout.split())
    tally("slips in real time that were caught", caught)
    tally("slips in real time that came too late to matter", whole)
    assert leftovers(root) == []


def test_slips_are_caught_or_harmless(tmp_path: Path, tally: Tally) -> None:
    slips(tmp_path, tally, 20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_hundreds_of_slips_are_caught_or_harmless(tmp_path: Path, tally: Tally) -> None:
    slips(tmp_path, tally, 600)
