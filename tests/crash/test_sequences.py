"""Sequences of saves between which anything may be written to, by any way: never a stale byte.

Unchanged segments are linked. So each save is followed by a comparison of all that it holds, bit for bit,
with what was in memory when it was made, and each earlier checkpoint has to hold what it held.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.checkpoint.test_round_trips import bits, savable_dtypes
from tests.crash.tally import Tally, draw_seed, rounds

from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.tree import DTYPES

_DTYPES = [DTYPES[name] for name in savable_dtypes()]
_NAMES = ["w", "a.b", "", "..", "model/w", "ä", "x" * 40, "$t", 0, "0", "\udfff", "nul\x00"]


@pytest.fixture(params=[1, 1 << 20], ids=["all linked", "as it is"])
def linked_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in ("linking", "grouping"):
        monkeypatch.setattr(f"keepstep.checkpoint.saving.{module}.LINKED_FROM_BYTES", request.param)
    monkeypatch.setattr(KnownDigests, "_LEAST_BYTES", min(request.param * 8192, 1 << 20))
    return int(request.param)


def snapshot(value: Any) -> Any:
    """A copy that no later write reaches."""
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().resolve_neg().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    return [snapshot(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------- writes


def _random_byte(draw: random.Random, tensor: torch.Tensor) -> tuple[int, int]:
    """Where in a dense tensor's memory, and what to write there; booleans stay booleans."""
    at = draw.randrange(tensor.nbytes)
    return at, draw.randrange(2 if tensor.dtype is torch.bool else 256)


def _by_index(draw: random.Random, tensor: torch.Tensor) -> None:
    at, byte = _random_byte(draw, tensor)
    tensor.view(-1).view(torch.uint8)[at] = byte


def _through_data(draw: random.Random, tensor: torch.Tensor) -> None:
    at, byte = _random_byte(draw, tensor)
    tensor.data.view(-1).view(torch.uint8)[at : at + 1].fill_(byte)


def _through_numpy(draw: random.Random, tensor: torch.Tensor) -> None:
    at, byte = _random_byte(draw, tensor)
    tensor.view(-1).view(torch.uint8).numpy()[at] = byte


def _through_an_address(draw: random.Random, tensor: torch.Tensor) -> None:
    at, byte = _random_byte(draw, tensor)
    ctypes.memset(tensor.data_ptr() + at, byte, 1)


def _by_the_kernel(draw: random.Random, tensor: torch.Tensor) -> None:
    """A read from a pipe straight into the memory, as loaders do it."""
    at, byte = _random_byte(draw, tensor)
    reading, writing = os.pipe()
    os.write(writing, bytes([byte]))
    os.readv(reading, [tensor.view(-1).view(torch.uint8).numpy().data[at : at + 1]])
    os.close(reading)
    os.close(writing)


def _by_another_thread(draw: random.Random, tensor: torch.Tensor) -> None:
    thread = threading.Thread(target=_through_an_address, args=(draw, tensor))
    thread.start()
    thread.join()


def _whole(draw: random.Random, tensor: torch.Tensor) -> None:
    tensor.copy_(bits(tensor.dtype, tuple(tensor.shape)))


def _the_same_values(draw: random.Random, tensor: torch.Tensor) -> None:
    tensor.copy_(tensor.clone())


def _other_memory(draw: random.Random, tensor: torch.Tensor) -> None:
    """The old values, elsewhere, and one of them changed; what shared the memory keeps the old ones."""
    tensor.set_(tensor.clone())
    _through_data(draw, tensor)


WRITES: list[Callable[[random.Random, torch.Tensor], None]] = [
    _by_index,
    _through_data,
    _through_numpy,
    _through_an_address,
    _by_the_kernel,
    _by_another_thread,
    _whole,
    _the_same_values,
    _other_memory,
]

# -------------------------------------------------------------------------------------- the sequence


class Sequence:
    """A store, a live state, and what each checkpoint is to hold.

    Attributes:
        counts: of saves, linked files and comparisons.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.root = root
        self.memory = root / "store"
        self.store = Store(self.memory)
        self.expected: dict[str, Any] = {}
        self.counts = {"saves": 0, "links": 0, "comparisons": 0}
        self.state: dict[Any, Any] = {}
        for number in range(self.draw.randint(1, 4)):
            self.state[f"g{number}"] = {name: self._leaf() for name in self._some_names()}
        self.resting = [torch.rand(300_000), torch.rand(20_000), torch.rand(30_000)[7:]]
        self.state["large"] = {"w": self.resting[0], "v": torch.rand(3)}
        self.state["resting"] = self.resting[1:]
        self.state["train"] = {"step": 0}

    def _some_names(self) -> list[Any]:
        return self.draw.sample(_NAMES, self.draw.randint(1, 5))

    def _leaf(self) -> Any:
        dtype = self.draw.choice(_DTYPES)
        shape = self.draw.choice([(), (0,), (3, 0, 2), (1,), (7,), (4, 6), (2, 3, 5), (1000,)])
        tensor = bits(dtype, shape)
        kind = self.draw.randrange(8)
        if kind == 0:
            return np.random.default_rng(self.draw.randrange(1 << 30)).random(shape)
        if kind == 1:
            return [tensor, tensor]
        if kind == 2:
            return torch.randn(4, 6).t()
        if kind == 3:
            return torch.randn(5, dtype=torch.cfloat).conj()
        if kind == 4:
            base = torch.randn(24)
            return [base[2:9], base, base.view(4, 6), base[::3]]
        if kind == 5:
            array = np.arange(12.0)
            return [array, torch.from_numpy(array)]
        if kind == 6:
            return bits(torch.uint8, (64,)).share_memory_()
        return tensor

    def _tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state, and the memory of its arrays."""
        found: list[torch.Tensor] = []
        left: list[Any] = [self.state]
        while left:
            value = left.pop()
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, np.ndarray) and value.size:
                found.append(torch.from_numpy(value.reshape(-1)))
            elif isinstance(value, dict | list):
                left += value.values() if isinstance(value, dict) else value
        return [t for t in found if t.numel() and t.is_contiguous() and not t.is_conj()]

    def change(self) -> None:
        """Write to some of the state, or to none of it."""
        for _ in range(self.draw.choice([0, 0, 1, 1, 2, 5])):
            among = self.resting if self.draw.random() < 0.15 else self._tensors()
            self.draw.choice(WRITES)(self.draw, self.draw.choice(among))
        groups = [name for name in self.state if str(name).startswith("g")]
        what = self.draw.randrange(10)
        if what == 0 and groups:
            self.state[self.draw.choice(groups)]["new"] = self._leaf()
        elif what == 1 and groups:
            group = self.state[self.draw.choice(groups)]
            if len(group) > 1:
                del group[self.draw.choice(list(group))]
        elif what == 2 and groups:
            self.state[f"g{self.draw.randrange(9)}"] = self.state.pop(self.draw.choice(groups))
        self.state["train"]["step"] += 1

    def save(self) -> None:
        expected = snapshot(self.state)
        how = self.draw.randrange(4)
        if how == 0:
            checkpoint = self.store.save(self.state)
        else:
            staging = "awaited" if how == 1 else "overlapped"
            pending = self.store.save_in_background(self.state, staging=staging)  # type: ignore[arg-type]
            if how < 3:
                pending.wait_staged()
                self.change()  # once it is copied, anything may be written
            checkpoint = pending.wait()
        self.counts["saves"] += 1
        self.counts["links"] += sum(p.stat().st_nlink > 1 for p in checkpoint.path.glob("*.safetensors"))
        self.expected[checkpoint.name] = expected
        self._compare(checkpoint)

    def _compare(self, checkpoint: Checkpoint) -> None:
        report = checkpoint.verify()
        assert report.sound, report.problems
        assert_same(checkpoint.load(), self.expected[checkpoint.name])
        self.counts["comparisons"] += 1

    def compare_all(self) -> None:
        found = self.store.list()
        assert {checkpoint.name for checkpoint in found} == set(self.expected)
        for checkpoint in found:
            self._compare(checkpoint)

    def meddle(self) -> None:
        """Delete, copy, prune, or begin anew from the newest one."""
        names = list(self.expected)
        what = self.draw.randrange(6)
        if what < 2 and names:
            name = self.draw.choice(names) if what else names[-1]
            self.store.delete(name)
            del self.expected[name]
        elif what == 2 and names:
            name = self.draw.choice(names)
            copied = self.root / f"copy of {name}"
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(self.memory / name, copied)
            assert Checkpoint.open(copied).verify().sound
            assert_same(Checkpoint.open(copied).load(), self.expected[name])
        elif what == 3:
            self.store = Store(self.memory)
        elif what == 4 and names:
            self._resume(names[-1])
        elif what == 5:
            Store(self.memory, retention=Retention(keep_last=3)).prune()
            self.expected = {c.name: self.expected[c.name] for c in self.store.list()}

    def _resume(self, newest: str) -> None:
        self.store = Store(self.memory)
        self.state = snapshot(self.expected[newest])
        self.resting = [self.state["large"]["w"], *self.state["resting"]]
        for tensor in self._tensors():
            tensor.view(-1).view(torch.uint8).zero_()
        assert self.store.load_latest_into(self.state) is not None
        assert_same(self.state, self.expected[newest])


def play(root: Path, tally: Tally, count: int) -> None:
    seed = draw_seed()
    total = {"saves": 0, "links": 0, "comparisons": 0}
    for number in range(rounds(count)):
        torch.manual_seed(seed + number)
        sequence = Sequence(root / str(number), seed + number)
        try:
            for _ in range(10):
                sequence.change()
                sequence.save()
                if sequence.draw.random() < 0.5:
                    sequence.meddle()
            sequence.compare_all()
        except BaseException as error:
            error.add_note(f"CRASH_SEED={seed + number} CRASH_ROUNDS=0 finds it at once")
            raise
        for name in total:
            total[name] += sequence.counts[name]
        shutil.rmtree(root / str(number))
    tally("saves of random states", total["saves"])
    tally("links in saves of random states", total["links"])
    tally("comparisons of saved and loaded random states", total["comparisons"])
    assert total["links"], "nothing was linked"


def test_no_sequence_of_saves_gives_a_stale_byte(tmp_path: Path, tally: Tally, linked_from: int) -> None:
    play(tmp_path, tally, 8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_sequence_of_saves_gives_a_stale_byte_for_long(
    tmp_path: Path, tally: Tally, linked_from: int
) -> None:
    play(tmp_path, tally, 200)
