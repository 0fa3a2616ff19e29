"""Checkpoints of a trial in a bucket, on a real S3 server."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tests.buckets.server import Server
from tests.checkpoint.test_handed_over import ODD

from keepstep import Store
from keepstep.tune import Checkpoint
from keepstep.tune.experiment.removal import delete, sweep
from keepstep.tune.saving import Saver

MIB = 1 << 20


def test_directories_and_states_are_saved_read_shared_and_deleted(
    server: Server, address: str, tmp_path: Path
) -> None:
    options = server.options()
    trial = f"{address}/trial"
    given = tmp_path / "given"
    (given / "a" / "empty").mkdir(parents=True)
    files = {"base": os.urandom(9 * MIB), f"a/{ODD}": b"odd", "a/none": b""}
    for name, data in files.items():
        (given / name).write_bytes(data)
    saver = Saver(trial, storage_options=options, next_checkpoint=2)
    for step in (1, 2):
        (given / "step").write_text(str(step))
        saver.save(Checkpoint(given), iteration=step, metrics={"loss": 1 / step})
    saver.save({"model": {"w": torch.arange(10)}}, iteration=3, metrics={})
    store = Store(trial, storage_options=options)
    assert [found.name for found in store.list()] == [f"checkpoint_00000{n}" for n in (2, 3, 4)]
    reports = store.verify()
    assert all(report.sound for report in reports), reports
    assert delete(trial, ["checkpoint_000002"], options) == []
    checkpoint = Checkpoint(f"{trial}/checkpoint_000003", storage_options=options)
    with checkpoint.as_directory() as directory:
        assert (Path(directory) / "step").read_text() == "2"
        assert {name: (Path(directory) / name).read_bytes() for name in files} == files
        assert (Path(directory) / "a" / "empty").is_dir()
    assert checkpoint.metrics == {"loss": 0.5}
    # Taken over by another trial of the same bucket, as an exploit does.
    other = f"{address}/other"
    again = Saver(other, storage_options=options, resumed_from=f"{trial}/checkpoint_000003")
    again.save(checkpoint, iteration=3, metrics={})
    state = Checkpoint(f"{trial}/checkpoint_000004", storage_options=options)
    assert state.load()["model"]["w"].tolist() == list(range(10))
    assert sweep(trial, ["checkpoint_000003"], options) == ["checkpoint_000004"]
    copied = Checkpoint(f"{other}/checkpoint_000000", storage_options=options).to_directory(tmp_path / "copy")
    assert {name: (Path(copied) / name).read_bytes() for name in files} == files
    assert delete(trial, ["checkpoint_000003"], options) == []
    assert [found.key for found in store._backend._objects.list()] == []  # type: ignore[attr-defined]
