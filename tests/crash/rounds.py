"""Rounds of random kills: a child saves as fast as it can, is killed at an instant that nobody chose, and
what it leaves is held against what it had announced.

Run as `python -m tests.crash.rounds ROOT KIND SEED COUNT`: a process without threads of its own that forks
each child, so that a round takes a tenth of a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.checkpoint.equality import assert_same
from tests.crash.harness import leftovers
from tests.forked import in_fork

from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.keeping.catalog import disk_bytes
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import CheckpointNotFoundError, NoValidCheckpointError

__all__ = ["KINDS"]

_STEP = struct.Struct("<q")
_BASE = torch.arange(300_000, dtype=torch.float32)  # more than 1 MiB, so that it is linked

Announce = Callable[[int], None]


def state(number: int) -> dict[str, Any]:
    """What the step of this number leaves behind."""
    weights = torch.arange(40_000, dtype=torch.float32) * (number + 1)
    return {
        "model": {"w": weights, "tied": weights.t(), "b": torch.full((7,), float(number))},
        "optimizer": {"m": torch.full((20_000,), number, dtype=torch.int64)},
        "train": {"step": number, "rng": (number, b"rng")},
    }


def adapted(number: int) -> dict[str, Any]:
    """A frozen base beside an adapter."""
    return {"base": {"w": _BASE.clone()}, "adapter": {"w": torch.full((500,), float(number))}, "step": number}


def step_of(loaded: dict[str, Any]) -> int:
    step = loaded["train"]["step"] if "train" in loaded else loaded["step"]
    assert_same(loaded, (state if "train" in loaded else adapted)(step))
    return int(step)


# ------------------------------------------------------------------------------- what children do


def resumed(store: Store, make: Callable[[int], dict[str, Any]]) -> int:
    live = make(0)
    step = 0 if store.load_latest_into(live) is None else step_of(live)
    store.claim()
    assert leftovers(store.path) == []
    return step


def save(root: Path, announce: Announce) -> None:
    store = Store(root, retention=Retention(keep_last=3))
    step = resumed(store, state)
    while True:
        step += 1
        store.save(state(step), step=step)
        announce(step)


def awaited(root: Path, announce: Announce) -> None:
    store = Store(root, retention=Retention(keep_last=3))
    step = resumed(store, state)
    while True:
        step += 1
        store.save_in_background(state(step), step=step)  # waits for the one before
        announce(step - 1)


def overlapped(root: Path, announce: Announce) -> None:
    """One live state that is trained in place, as a loop does it."""
    store = Store(root, retention=Retention(keep_last=2))
    step = resumed(store, state)
    live = state(step)
    while True:
        pending = store.save_in_background(live, step=step, staging="overlapped")
        announce(step - 1)
        pending.wait_staged()
        step += 1
        _train(live, step)


def _train(live: dict[str, Any], step: int) -> None:
    new = state(step)
    for group in ("model", "optimizer"):
        for name, tensor in live[group].items():
            if name != "tied":
                tensor.copy_(new[group][name])
    live["train"] = new["train"]


def linked(root: Path, announce: Announce) -> None:
    store = Store(root, retention=Retention(keep_last=4))
    step = resumed(store, adapted)
    while True:
        step += 1
        how = step % 3
        if how == 0:
            store.save(adapted(step), step=step)
        else:
            live = adapted(step)
            store.save_in_background(live, step=step, staging="awaited" if how == 1 else "overlapped").wait()
        announce(step)


def pruned(root: Path, announce: Announce) -> None:
    """Retention with every rule at work, and deletions by hand."""
    rules = Retention(keep_last=1, keep_best=("loss", "min", 2), keep_every_n_steps=50, byte_budget=4_000_000)
    store = Store(root, retention=rules)
    step = resumed(store, state)
    while True:
        step += 1
        store.save(state(step), step=step, metrics={"loss": (step * 7919) % 1000})
        announce(step)
        if step % 5 == 0 and len(found := store.list()) > 2:
            store.delete(found[0])


def replaced(root: Path, announce: Announce) -> None:
    """One explicit directory, replaced again and again."""
    target = root / "mine"
    try:
        step = step_of(Checkpoint.open(target).load())
    except CheckpointNotFoundError:
        step = 0
    while True:
        step += 1
        save_directory(target, state(step), step=step)
        announce(step)


KINDS: dict[str, Callable[[Path, Announce], None]] = {
    "save": save,
    "awaited": awaited,
    "overlapped": overlapped,
    "linked": linked,
    "pruned": pruned,
    "replaced": replaced,
    "damaged": save,
}

# ------------------------------------------------------------------------------------- the killer


class Killer:
    """Plays rounds on one directory and checks what each leaves.

    Attributes:
        durable: the largest step that was announced as committed and has to be there.
        counts: what was done and met, by name.
    """

    def __init__(self, root: Path, kind: str, seed: int) -> None:
        self.root = root
        self.kind = kind
        self.durable = 0
        self.counts = {
            "kills": 0,
            "in a save": 0,
            "announced": 0,
            "verified": 0,
            "damaged": 0,
            "passed over": 0,
        }
        self._draw = random.Random(seed)

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            self._kill_one()
            self.counts["kills"] += 1
            self.counts["in a save"] += any(".tmp-" in line for line in leftovers(self.root))
            if self.kind == "replaced":
                self._check_directory()
            else:
                self._check_store()
            if self.kind == "damaged" and self._draw.random() < 0.4:
                self._damage()

    def _kill_one(self) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _be_killed(self.kind, self.root, writing)
        os.close(writing)
        said = self._wait(reading)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while part := os.read(reading, 1 << 16):
            said += part
        os.close(reading)
        if not os.WIFSIGNALED(status):
            raise AssertionError(f"the child failed by itself: {said.decode(errors='replace')}")
        steps = [step for (step,) in _STEP.iter_unpack(said[: len(said) // _STEP.size * _STEP.size])]
        self.counts["announced"] += len(steps)
        self.durable = max([self.durable, *steps])

    def _wait(self, reading: int) -> bytes:
        """Wait for none to three announcements, then a part of the time that a save takes; what was said."""
        said = b""
        for _ in range(self._draw.choice([0, 1, 1, 2, 3])):
            said += os.read(reading, 1 << 16)
        time.sleep(self._draw.choice([0.005, 0.02, 0.05, 0.1]) * self._draw.random())
        return said

    def _check_store(self) -> None:
        store = Store(self.root)
        found = store.list()
        newest = 0
        for checkpoint in found:
            report = checkpoint.verify()
            assert report.sound, report.problems
            newest = step_of(checkpoint.load())
            assert newest == checkpoint.step
            self.counts["verified"] += 1
        assert newest >= self.durable, f"{self.durable} was announced, {newest} is the newest that is there"
        numbers = [int(checkpoint.name.rpartition("_")[2]) for checkpoint in found]
        assert numbers == sorted(numbers)
        assert [c.step for c in found] == sorted(c.step or 0 for c in found)
        if self.kind == "linked" and found:
            self._check_links(found)

    def _check_links(self, found: list[Checkpoint]) -> None:
        bases = [checkpoint.path / "base.safetensors" for checkpoint in found]
        (inode,) = {base.stat().st_ino for base in bases}
        names = [path for path in self.root.rglob("base.safetensors") if path.stat().st_ino == inode]
        assert bases[0].stat().st_nlink == len(names)
        size = bases[0].stat().st_size
        assert size <= disk_bytes(*(checkpoint.path for checkpoint in found)) < 2 * size

    def _check_directory(self) -> None:
        try:
            checkpoint = Checkpoint.open(self.root / "mine")
        except CheckpointNotFoundError:
            assert self.durable == 0
            return
        assert checkpoint.verify().sound
        self.counts["verified"] += 1
        assert step_of(checkpoint.load()) >= self.durable

    def _damage(self) -> None:
        """Spoil the newest checkpoint; the one before it is what a resume has to come to."""
        found = Store(self.root).list()
        if len(found) < 2:
            return
        victim = self._draw.choice(sorted(found[-1].path.iterdir()))
        data = bytearray(victim.read_bytes())
        how = self._draw.choice(["flip", "cut", "remove"])
        if how == "flip":
            data[self._draw.randrange(len(data))] ^= 1 << self._draw.randrange(8)
            victim.write_bytes(data)
        elif how == "cut":
            victim.write_bytes(data[: self._draw.randrange(len(data))])
        else:
            victim.unlink()
        self.counts["damaged"] += 1
        self.durable = found[-2].step or 0
        unlisted = how == "remove" and victim.name == "manifest.json"  # and so no checkpoint any more
        # In a process of its own: whoever sets a checkpoint aside holds the store until it ends.
        assert in_fork(lambda: self._pass_over(found[-1].name, aside=not unlisted)) == 0
        self.counts["passed over"] += 1

    def _pass_over(self, damaged: str, *, aside: bool) -> None:
        live, store = state(0), Store(self.root)
        taken = store.load_latest_into(live)
        assert taken is not None
        assert step_of(live) == taken.step == self.durable
        assert damaged not in [checkpoint.name for checkpoint in store.list()]
        assert (self.root / ".keepstep" / "damaged" / damaged).is_dir() == aside

    def finish(self) -> None:
        """The next process that saves leaves nothing behind but checkpoints."""
        if self.kind == "replaced":
            save_directory(self.root / "mine", state(1))
        else:
            store = Store(self.root, retention=Retention(keep_last=1))
            step = resumed(store, adapted if self.kind == "linked" else state)
            store.save((adapted if self.kind == "linked" else state)(step + 1), step=step + 1)
            (only,) = store.list()
            if self.kind == "linked":
                assert (only.path / "base.safetensors").stat().st_nlink == 1
        assert leftovers(self.root) == []


def _be_killed(kind: str, root: Path, writing: int) -> None:
    try:
        KINDS[kind](root, lambda step: os.write(writing, _STEP.pack(step)))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent tells it
        os.write(writing, traceback.format_exc().encode())
    finally:
        os._exit(1)


def main() -> None:
    """Play the rounds that the command line asks for; print what was counted."""
    root, kind, seed, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    killer = Killer(root, kind, seed)
    try:
        killer.play(rounds)
        killer.finish()
    except (AssertionError, NoValidCheckpointError) as error:
        error.add_note(f"CRASH_SEED={seed}, {kind}, round {killer.counts['kills']}")
        raise
    print(json.dumps(killer.counts))


if __name__ == "__main__":
    main()
