"""Mangled checkpoints by the thousand: refused as damage, never followed, never obeyed, never believed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.test_parse import little_memory, rewrite, write_manifest, write_state
from tests.crash.tally import Tally, draw_seed, rounds

from keepstep.checkpoint.format.manifest import combine_digests, digest_of
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    MismatchError,
    NoValidCheckpointError,
    RestoreError,
    StoreError,
    UnsupportedTypeError,
    UsageError,
)

FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "marshal.",
    "pickle.",
    "subprocess.",
    "os.system",
    "os.exec",
    "ctypes.",
)
"""Audit events of a program that does as it is told by what it reads."""


class Watch:
    """What Python opens and runs while it is on: audit hooks can't be taken out again."""

    def __init__(self) -> None:
        self.on = False
        self.root = ""
        self.trespasses: list[str] = []
        sys.addaudithook(self._seen)

    def _seen(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.link"}:
            path = (
                os.path.realpath(os.fsdecode(args[0]))
                if isinstance(args[0], str | bytes | os.PathLike)
                else ""
            )
            source = path.endswith(".py")  # of the program itself, to show a line of it
            # Who claims a store writes down which process of which boot it is.
            me = ("/proc/self", f"/proc/{os.getpid()}/", "/proc/sys/kernel/random/boot_id")
            if path and not source and not path.startswith((self.root, *me)):
                self.trespasses.append(f"{event} {path}")
        elif event.startswith(FORBIDDEN):
            self.trespasses.append(f"{event} {args!r:.200}")

    @contextlib.contextmanager
    def within(self, root: Path) -> Iterator[None]:
        self.root, self.on = os.path.realpath(root), True
        try:
            yield
        finally:
            self.on = False
        found, self.trespasses = self.trespasses, []
        assert not found, found


watch = Watch()


def make_state() -> dict[str, Any]:
    torch.manual_seed(0)
    w = torch.randn(6, 4)
    return {
        "model": {"w": w, "tied": w.t(), "b": torch.zeros(3), "c": torch.randn(3, dtype=torch.cfloat).conj()},
        "frozen": {"base": torch.arange(300_000, dtype=torch.float32)},
        "train": {
            "n": np.arange(3),
            "s": np.float32(1.5),
            "step": 1,
            "x": (1.5, b"b", {1, 2}, float("inf")),
            "d": {8: "small"},
        },
    }


def live_state() -> dict[str, Any]:
    state = make_state()
    for tensor in (state["model"]["w"], state["model"]["b"], state["frozen"]["base"]):
        tensor.zero_()
    return state


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two checkpoints that share a segment."""
    root = tmp_path_factory.mktemp("originals")
    store = Store(root)
    for step in (1, 2):
        store.save(make_state(), step=step, metrics={"loss": 1.5, "best": float("nan")}, tags=("t",))
    segment = root / "checkpoint_1" / "frozen.safetensors"
    assert segment.stat().st_nlink == 2
    return root


# ------------------------------------------------------------------------------------------ mangling

JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    4096,
    1 << 31,
    1 << 62,
    1 << 64,
    -(1 << 70),
    10**300,
    1.5,
    -0.0,
    "",
    "../x",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "model.safetensors",
    "manifest.json",
    "state.json",
    "model/w",
    "float32",
    "O",
    "V8",
    "M8[ns]",
    "<f4",
    "x" * 5000,
    "\x00",
    "\ud800",
    "cuda:0",
    "__import__('os').system('true')",
    [],
    {},
    [[]],
    [0],
    [1 << 40, 1 << 40],
    [-1],
    {"$tensor": "model/w"},
    {"$tensor": "../x"},
    {"$ndarray": "train/n", "dtype": "|O", "shape": [3]},
    {"$codec": "os.system", "value": "true"},
    {"$object": "os.system", "state": "true"},
    {"$path": "/etc/passwd"},
    {"$dict": [[[], 1]]},
    {"$set": [{}]},
    {"$numpy_scalar": "AAAA", "dtype": "|O"},
    {"$numpy_dtype": "O"},
    {"$int": "0x" + "f" * 9000},
    {"$bytes": "!"},
    {"$datetime": "0000-99-99", "zone": "../../etc/passwd", "fold": 7},
    {"$datetime": "2020-01-01T00:00:00", "zone": "/etc/passwd", "fold": 0},
    {"$timedelta": [1 << 80, 0, 0]},
    {"$timezone": 1 << 40},
    {"$deque": [1], "maxlen": -1},
    {"$defaultdict": [], "factory": "eval"},
    {"$size": [-1]},
    {"$dtype": "__class__"},
    {"$device": "x:y"},
    {"$float": "zz"},
    {"$complex": [{}, 1]},
]


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places(node[key])


def mangle(draw: random.Random, document: Any) -> None:
    """Change one thing anywhere in it."""
    found = list(places(document))
    if not found:
        return
    container, key = draw.choice(found)
    what = draw.randrange(7)
    if what == 0:
        del container[key]
    elif what == 1:
        other, there = draw.choice(found)
        with contextlib.suppress(KeyError, IndexError):
            container[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(container[key])
    elif what == 2 and isinstance(container, dict):
        container[draw.choice([str(value) for value in JUNK if isinstance(value, str)])] = container.pop(key)
    elif what == 3 and isinstance(container[key], int):
        container[key] += draw.choice([-4096, -8, -1, 1, 4, 8, 4096, 1 << 40])
    elif what == 4 and isinstance(container[key], list):
        container[key] *= draw.choice([0, 2, 3])
    else:
        container[key] = copy.deepcopy(draw.choice(JUNK))


def mangle_header(draw: random.Random, directory: Path) -> None:
    """Change a segment's own header, and every digest that covers it."""
    name = draw.choice(["model.safetensors", "frozen.safetensors", "train.safetensors"])
    data = bytearray((directory / name).read_bytes())
    manifest = json.loads((directory / "manifest.json").read_text())
    end = manifest["files"][name]["header_bytes"]
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(min(end, 400))] = draw.randrange(256)
    (directory / name).unlink()  # it may be a link
    (directory / name).write_bytes(data)
    state = json.loads((directory / "state.json").read_text())
    inside = [t for t in state["tensors"].values() if t.get("file") == name]
    inside.sort(key=lambda t: (t["offset"], t["bytes"]))
    digests = [digest_of(bytes(data[:end])), *(t["digest"] for t in inside)]
    manifest["files"][name]["digest"] = combine_digests(digests)
    write_manifest(directory, manifest)


def mangle_bytes(draw: random.Random, directory: Path) -> None:
    """Change, cut or lengthen any file, digests left as they are."""
    path = draw.choice(sorted(directory.iterdir()))
    data = bytearray(path.read_bytes())
    what = draw.randrange(4)
    if what == 0:
        del data[draw.randrange(len(data)) :]
    elif what == 1:
        data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
    elif what == 2:
        at = draw.randrange(len(data))
        data[at : at + 8] = bytes(draw.randrange(256) for _ in range(8))
    else:
        other = draw.choice(sorted(directory.iterdir())).read_bytes()
        data = bytearray(other)
    path.unlink()
    path.write_bytes(data)


def mangle_documents(draw: random.Random, directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    state = json.loads((directory / "state.json").read_text())
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        mangle(draw, draw.choice([manifest, state, state.get("tensors", state)]))
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        write_state(directory, manifest, state)
    with contextlib.suppress(UnicodeEncodeError, ValueError):
        write_manifest(directory, manifest)


# ------------------------------------------------------------------------------------------- reading

REFUSALS = (DamagedCheckpointError, CheckpointNotFoundError, NoValidCheckpointError)
MISFITS = (MismatchError, UnsupportedTypeError, RestoreError, UsageError)
"""A document that is in order, but says something else than the live objects, or names no known codec."""


def outcome(way: Callable[[], Any]) -> str:
    """What came of reading: any other error than these is one that nobody meant."""
    try:
        way()
    except REFUSALS:
        return "refused"
    except StoreError as error:  # of a newer keepstep, as it seems: that is no damage
        if "upgrade keepstep" not in str(error):
            raise
        return "refused"
    except MISFITS:
        return "misfit"
    return "read"


def read_in_every_way(directory: Path) -> list[str]:
    store = Store(directory.parent)
    with watch.within(directory.parent):
        ways = [
            outcome(lambda: Checkpoint.open(directory).load()),
            outcome(lambda: Checkpoint.open(directory).load(verify=False)),
            outcome(lambda: Checkpoint.open(directory).load("model")),
            outcome(lambda: Checkpoint.open(directory).load_into(live_state())),
        ]
        verify_checkpoint(directory)
        verify_checkpoint(directory, quick=True)
        store.list()
        outcome(store.latest)
        store.best("loss")
        outcome(lambda: Store(directory.parent).load_latest_into(live_state()))
    return ways


def fuzz(tmp_path: Path, originals: Path, tally: Tally, count: int) -> None:
    seed = draw_seed()
    read_in_every_way(
        Path(shutil.copytree(originals, tmp_path / "warm")) / "checkpoint_1"
    )  # imports what it will
    manglers = [mangle_documents, mangle_documents, mangle_documents, mangle_header, mangle_bytes]
    outcomes = {"refused": 0, "misfit": 0, "read": 0}
    with little_memory(1 << 30):
        for number in range(rounds(count)):
            draw = random.Random(seed + number)
            root = tmp_path / "store"
            directory = Path(shutil.copytree(originals / "checkpoint_1", root / "checkpoint_1"))
            mangler = draw.choice(manglers)
            mangler(draw, directory)
            try:
                ways = read_in_every_way(directory)
                if mangler is mangle_bytes and ways[0] != "refused":
                    assert _same_as(originals / "checkpoint_1", directory), "other bytes were taken for sound"
            except BaseException as error:
                error.add_note(f"CRASH_SEED={seed + number} CRASH_ROUNDS=0 finds it at once")
                raise
            for way in ways:
                outcomes[way] += 1
            shutil.rmtree(root)
    tally("mangled checkpoints", rounds(count))
    for name, found in outcomes.items():
        tally(f"reads of mangled checkpoints: {name}", found)
    assert outcomes["refused"] > outcomes["read"] or rounds(count) < 10


def _same_as(left: Path, right: Path) -> bool:
    """A file may have been overwritten with what it held."""
    return all((right / path.name).read_bytes() == path.read_bytes() for path in left.iterdir())


def test_mangled_checkpoints_are_refused(tmp_path: Path, originals: Path, tally: Tally) -> None:
    fuzz(tmp_path, originals, tally, 250)


def test_live_tensors_that_overlap_in_memory_import_nothing(tmp_path: Path, originals: Path) -> None:
    """A mangled checkpoint once led to NumPy's module for masked arrays, which it imports when it is used."""
    checkpoint = Checkpoint.open(shutil.copytree(originals / "checkpoint_1", tmp_path / "checkpoint_1"))
    w = torch.zeros(6, 7)
    crossing = {"model": {"w": w[:, :4], "tied": w.flatten()[3:27].view(4, 6)}}
    outcome(lambda: checkpoint.load_into(live_state()))
    with watch.within(tmp_path):
        assert outcome(lambda: checkpoint.load_into(crossing, only="model")) == "misfit"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_mangled_checkpoints(tmp_path: Path, originals: Path, tally: Tally, part: int) -> None:
    fuzz(tmp_path, originals, tally, 2500)


def test_the_watch_sees_trespasses(tmp_path: Path) -> None:
    for trespass in (
        lambda: Path("/etc/hostname").read_bytes(),
        lambda: list(os.scandir("/etc")),
        lambda: eval(compile("1", "x", "eval")),
        lambda: os.system("true"),
    ):
        with pytest.raises(AssertionError), watch.within(tmp_path):
            trespass()  # type: ignore[no-untyped-call]
    with watch.within(tmp_path):
        (tmp_path / "x").write_text("mine")


# -------------------------------------------------------------------------------------------- flips


def flips(
    directory: Path, positions: Iterator[tuple[str, int]], live: Callable[[], Any], check_all: int
) -> int:
    """Flip single bits; each must be found by a load, and every `check_all`-th in every other way too."""
    done = 0
    for name, bit in positions:
        path = directory / name
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, bit // 8)[0]
            os.pwrite(file.fileno(), bytes([byte ^ (1 << bit % 8)]), bit // 8)
            with pytest.raises(DamagedCheckpointError):
                Checkpoint.open(directory).load()
            if done % check_all == 0:
                with pytest.raises(DamagedCheckpointError):
                    Checkpoint.open(directory).load_into(live())
                assert not verify_checkpoint(directory).sound, (name, bit)
            os.pwrite(file.fileno(), bytes([byte]), bit // 8)
        done += 1
    assert verify_checkpoint(directory).sound
    return done


def bits_of(directory: Path, draw: random.Random, share: float) -> Iterator[tuple[str, int]]:
    for path in sorted(directory.iterdir()):
        for bit in range(path.stat().st_size * 8):
            if share == 1 or draw.random() < share:
                yield path.name, bit


def small(root: Path) -> Path:
    state = make_state()
    del state["frozen"]
    return Store(root).save(state, step=1).path


def small_live() -> dict[str, Any]:
    state = live_state()
    del state["frozen"]
    return state


def test_a_share_of_all_bit_flips(tmp_path: Path, tally: Tally) -> None:
    directory = small(tmp_path)
    draw = random.Random(draw_seed())
    tally("single bit flips, all found", flips(directory, bits_of(directory, draw, 0.01), small_live, 10))


def test_flips_in_a_linked_segment_are_found_in_every_checkpoint_that_has_it(
    tmp_path: Path, originals: Path, tally: Tally
) -> None:
    store = Store(tmp_path)
    for step in (1, 2, 3):
        store.save(make_state(), step=step)
    directories = [checkpoint.path for checkpoint in store.list()]
    shared = directories[0] / "frozen.safetensors"
    draw = random.Random(draw_seed())
    size = shared.stat().st_size
    for at in [0, 8, 4095, 4096, size - 1, *(draw.randrange(size) for _ in range(20))]:
        with shared.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ (1 << draw.randrange(8))]), at)
            for directory in directories:
                with pytest.raises(DamagedCheckpointError):
                    Checkpoint.open(directory).load()
                with pytest.raises(DamagedCheckpointError):
                    Checkpoint.open(directory).load_into(live_state())
                assert not verify_checkpoint(directory).sound
            os.pwrite(file.fileno(), bytes([byte]), at)
        tally("single bit flips, all found", len(directories))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_every_single_bit_flip(tmp_path: Path, tally: Tally, part: int) -> None:
    directory = small(tmp_path)
    every = itertools.islice(bits_of(directory, random.Random(0), 1), part, None, 4)
    tally("single bit flips, all found", flips(directory, every, small_live, 50))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_flips_all_over_a_larger_checkpoint(tmp_path: Path, tally: Tally) -> None:
    directory = Store(tmp_path).save(make_state(), step=1).path
    draw = random.Random(draw_seed())
    tally("single bit flips, all found", flips(directory, bits_of(directory, draw, 0.0003), live_state, 5))


def test_rewriting_alone_does_no_harm(tmp_path: Path, originals: Path) -> None:
    directory = Path(shutil.copytree(originals / "checkpoint_1", tmp_path / "checkpoint_1"))
    rewrite(directory, lambda m, s: None)
    assert read_in_every_way(directory) == ["read"] * 4
