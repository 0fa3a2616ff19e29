"""What a trial's process saves, what the driver deletes and sweeps: in a directory and in a bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import MemoryStore

from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.place import registry
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.objects import Objects
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint as StateCheckpoint
from keepstep.errors import DirectoryNotSavableError, StoreBusyError, UnsupportedTypeError
from keepstep.tune import checkpoint as checkpoints
from keepstep.tune import places
from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.experiment.removal import delete, sweep
from keepstep.tune.saving import Saved, Saver, checkpoint_dirname

MIB = 1 << 20


@pytest.fixture(params=["directory", "bucket"])
def trial(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a trial's directory."""
    if request.param == "directory":
        return str(tmp_path / "experiment" / "trial")
    stores: dict[str, MemoryStore] = {}

    def opened(address: str, options: Any = None) -> BucketBackend:
        return BucketBackend(Objects(stores.setdefault(address, MemoryStore()), address))

    for module in (registry, places, checkpoints):
        monkeypatch.setattr(module, "open_bucket", opened)
    return "s3://bucket/experiment/trial"


def names(trial: str) -> list[str]:
    return places.open_place(trial).names()


def sound(trial: str) -> None:
    for name in names(trial):
        report = verify_checkpoint(places.open_place(trial).at(name))
        assert report.sound, report.problems


def made(root: Path, **files: bytes) -> Path:
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def read(trial: str, name: str) -> dict[str, bytes]:
    with Checkpoint(f"{trial}/{name}").as_directory() as directory:
        return {p.name: p.read_bytes() for p in Path(directory).iterdir()}


def test_directories_states_and_checkpoints_in_turn(trial: str, tmp_path: Path) -> None:
    saver = Saver(trial, lineage="exp/a", next_checkpoint=7)
    source = made(tmp_path / "source", model=os.urandom(2 * MIB), step=b"1")
    weights = torch.arange(MIB)
    first = saver.save(Checkpoint(source), iteration=1, metrics={"acc": 0.5, "nested": {"x": 1}, "l": [1]})
    assert first == Saved("checkpoint_000007", 2 * MIB + 1)
    saver.save({"model": {"w": weights}, "n": 2}, iteration=2, metrics={})
    made(source, step=b"3")
    saver.save(Checkpoint(source), iteration=3, metrics={"acc": float("nan")})
    saver.save({"model": {"w": weights}, "n": 4}, iteration=4, metrics={})
    given = save_directory(tmp_path / "given", {"n": 5}, epoch=1)
    saver.save(given, iteration=5, metrics={})
    saver.save(Checkpoint(given.path), iteration=6, metrics={})
    assert names(trial) == [checkpoint_dirname(number) for number in range(7, 13)]
    sound(trial)
    loaded = [Checkpoint(f"{trial}/{checkpoint_dirname(number)}") for number in range(7, 13)]
    assert loaded[0].metrics == {"acc": 0.5, "nested/x": 1}
    assert [loaded[index].load("n")["n"] for index in (1, 3, 4, 5)] == [2, 4, 5, 5]
    assert torch.equal(loaded[3].load("model")["model"]["w"], weights)
    assert read(trial, "checkpoint_000009")["step"] == b"3"
    if "://" not in trial:
        entries = Store(trial).list()
        assert [entry.step for entry in entries] == [1, 2, 3, 4, 5, 6]
        assert [entry.manifest.parent for entry in entries[1:]] == [
            entry.manifest.id for entry in entries[:-1]
        ]
        assert {entry.manifest.run for entry in entries} == {"exp/a"}
        assert Store(trial).best("acc", "max") is not None


def test_it_is_known_what_was_reported_as_a_state(trial: str, tmp_path: Path) -> None:
    """A directory comes back as a directory, also if it is a whole checkpoint of an `Accelerator`'s."""
    saver = Saver(trial)
    whole = save_directory(tmp_path / "whole", {"n": 5})
    made(tmp_path / "plain", a=b"1")
    given = [Checkpoint(tmp_path / "plain"), Checkpoint(whole.path), whole, {"n": 1}]
    for step, what in enumerate(given):
        saver.save(what, iteration=step, metrics={})
    reported = [Checkpoint(f"{trial}/{name}") for name in names(trial)]
    assert [checkpoint.is_state for checkpoint in reported] == [False, False, True, True]
    again = Saver(f"{trial}_again")
    for step, checkpoint in enumerate(reported):
        again.save(checkpoint, iteration=step, metrics={})
    assert [Checkpoint(f"{trial}_again/{name}").is_state for name in names(f"{trial}_again")] == [
        False, False, True, True
    ]  # fmt: skip
    assert not Checkpoint(tmp_path / "plain").is_state


def test_what_did_not_change_is_shared_and_outlives_what_is_deleted(trial: str, tmp_path: Path) -> None:
    """Also over a restart, which knows the checkpoint that it goes on from."""
    base = os.urandom(3 * MIB)
    source = made(tmp_path / "source", base=base, head=b"0")
    saver = Saver(trial)
    for step in range(2):
        saver.save(Checkpoint(made(source, head=b"%d" % step)), iteration=step, metrics={})
    assert delete(trial, ["checkpoint_000000"]) == []
    resumed = Saver(trial, next_checkpoint=2, resumed_from=f"{trial}/checkpoint_000001")
    for step in range(2, 4):
        resumed.save(Checkpoint(made(source, head=b"%d" % step)), iteration=step, metrics={})
        assert delete(trial, [checkpoint_dirname(step - 1)]) == []
    assert names(trial) == ["checkpoint_000003"]
    assert read(trial, "checkpoint_000003") == {"base": base, "head": b"3"}
    place = places.open_place(trial)
    held = source_identities(place, "checkpoint_000003")
    resumed.save(Checkpoint(source), iteration=4, metrics={})
    assert held & source_identities(place, "checkpoint_000004"), "the base was written once"


def source_identities(place: Any, name: str) -> set[Any]:
    from keepstep.checkpoint.format.parse import read_manifest
    from keepstep.checkpoint.format.source import source_of

    return set(source_of(place.at(name)).held(read_manifest(place.at(name)).files))


def test_states_are_linked_over_a_restart(tmp_path: Path) -> None:
    trial = str(tmp_path / "trial")
    frozen = torch.arange(MIB)
    Saver(trial).save({"base": {"w": frozen}, "n": 0}, iteration=1, metrics={})
    resumed = Saver(trial, next_checkpoint=1, resumed_from=f"{trial}/checkpoint_000000")
    resumed.save({"base": {"w": frozen}, "n": 1}, iteration=2, metrics={})
    inodes = {(Path(trial) / name / "base.safetensors").stat().st_ino for name in names(trial)}
    assert len(inodes) == 1


def test_an_unreported_leftover_of_the_same_name_is_replaced(trial: str, tmp_path: Path) -> None:
    source = made(tmp_path / "source", step=b"1")
    for step in (b"1", b"2", b"3"):
        saver = Saver(trial, next_checkpoint=4)
        saver.save(Checkpoint(made(source, step=step)), iteration=1, metrics={})
        assert names(trial) == ["checkpoint_000004"]
        assert read(trial, "checkpoint_000004") == {"step": step}
    saver = Saver(trial, next_checkpoint=4)
    saver.save({"n": 1}, iteration=1, metrics={})
    assert Checkpoint(f"{trial}/checkpoint_000004").load() == {"n": 1}
    sound(trial)


def test_a_damaged_leftover_is_set_aside(tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    Saver(str(trial)).save({"n": 1}, iteration=1, metrics={})
    (trial / "checkpoint_000000" / "manifest.json").write_text("{")
    Saver(str(trial)).save({"n": 2}, iteration=1, metrics={})
    assert Checkpoint(trial / "checkpoint_000000").load() == {"n": 2}
    assert (trial / ".keepstep" / "damaged" / "checkpoint_000000").is_dir()


def test_what_could_not_be_saved_leaves_nothing_and_takes_no_number(trial: str, tmp_path: Path) -> None:
    saver = Saver(trial)
    source = made(tmp_path / "source", a=b"1")
    (source / "link").symlink_to("a")
    with pytest.raises(DirectoryNotSavableError, match="link is a link"):
        saver.save(Checkpoint(source), iteration=1, metrics={})
    with pytest.raises(UnsupportedTypeError):
        saver.save({"x": object()}, iteration=1, metrics={})
    (source / "link").unlink()
    assert saver.save(Checkpoint(source), iteration=1, metrics={}).name == "checkpoint_000000"
    assert names(trial) == ["checkpoint_000000"]


def test_a_sweep_takes_what_the_journal_does_not_know(trial: str, tmp_path: Path) -> None:
    assert sweep(trial, []) == [], "there may be nothing yet"
    saver = Saver(trial)
    source = made(tmp_path / "source", a=b"1" * MIB)
    for step in range(3):
        saver.save(Checkpoint(source), iteration=step, metrics={})
    assert sweep(trial, ["checkpoint_000000", "checkpoint_000001"]) == ["checkpoint_000002"]
    sound(trial)
    assert names(trial) == ["checkpoint_000000", "checkpoint_000001"]
    unfinished = places.open_place(trial).workspace("checkpoint_000002")
    unfinished.open()
    unfinished.write_file("files/a", b"1")
    if "://" in trial:
        assert sweep(trial, names(trial)) == []
        with pytest.raises(StoreBusyError, match="another process writes"):
            unfinished.commit(b"{}")
    else:
        assert sweep(trial, names(trial)) == [], "its process lives, and holds a lock"
        unfinished.discard()
    assert delete(trial, ["checkpoint_000000", "checkpoint_000001", "checkpoint_000009"]) == []
    assert names(trial) == []


def test_what_is_being_read_is_deleted_later(tmp_path: Path) -> None:
    trial = str(tmp_path / "trial")
    saver = Saver(trial)
    for step in range(2):
        saver.save({"n": step}, iteration=step, metrics={})
    with Checkpoint(f"{trial}/checkpoint_000000").as_directory():
        assert delete(trial, names(trial)) == ["checkpoint_000000"]
    assert delete(trial, ["checkpoint_000000"]) == []
    assert names(trial) == []


KILLED = """
    import os, sys, threading, time
    from pathlib import Path
    from keepstep.tune import Checkpoint
    from keepstep.tune.saving import Saver
    source = Path(sys.argv[2])
    saver = Saver(sys.argv[1])
    step = 0
    while True:
        (source / "large").write_bytes(bytes([step % 256]) * (6 << 20))
        (source / "small").write_bytes(bytes([step % 256]))
        saver.save(Checkpoint(source), iteration=step, metrics={})
        print(step, flush=True)
        step += 1
"""


def test_a_trial_killed_while_it_saves_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """A real SIGKILL, at an instant of its own each time."""
    for round_ in range(4):
        trial = tmp_path / f"trial{round_}"
        source = made(tmp_path / "source")
        code = textwrap.dedent(KILLED)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(trial), str(source)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(2 + round_):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = names(str(trial))
        assert len(found) >= reported + 1
        for step, name in enumerate(found):
            kept = read(str(trial), name)
            assert kept == {"large": bytes([step]) * (6 * MIB), "small": bytes([step])}
        known = found[: reported + 1]
        sweep(str(trial), known)
        assert sorted(path.name for path in trial.iterdir()) == sorted(
            [*known, *([".keepstep"] if len(found) > len(known) else [])]
        )


def test_names_with_zeros_are_checkpoints_for_all_tools(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    from keepstep.cli.main import main

    trial = tmp_path / "trial"
    saver = Saver(str(trial), next_checkpoint=9)
    for step in range(3):
        saver.save({"n": step}, iteration=step, metrics={"loss": -step})
    store = Store(trial)
    assert [found.name for found in store.list()] == [f"checkpoint_{n:06d}" for n in (9, 10, 11)]
    latest = store.latest()
    assert latest is not None
    assert latest.name == "checkpoint_000011"
    assert store.next_number == 12
    assert not caplog.records
    for arguments in (["ls", str(trial)], ["show", str(trial), "10"], ["verify", str(trial)]):
        assert run(main, arguments) == 0
        assert "checkpoint_000010" in capsys.readouterr().out
    # Two spellings of one number: one of them counts, and the other is left alone.
    save_directory(trial / "checkpoint_11", {"n": 77})
    (trial / "checkpoint_10").mkdir()
    assert [found.name for found in store.list()] == [
        "checkpoint_000009",
        "checkpoint_000010",
        "checkpoint_11",
    ]
    assert "checkpoint_000011 is not looked at: checkpoint_11 has the same number" in caplog.text
    live = {"n": 0}
    assert Store(trial).load_latest_into(live) is not None
    assert live == {"n": 77}
    Store(trial).delete("checkpoint_11")
    assert StateCheckpoint.open(trial / "checkpoint_000011").load() == {"n": 2}


def run(main: Callable[..., Any], arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)
