"""A value that this installation can't make is no damage of the checkpoint that holds it."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep import Store
from keepstep.checkpoint.saving import save as saving
from keepstep.errors import RestoreError, TensorNotSavableError
from keepstep.tree import unflatten

BERLIN = dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))


class Clock:
    def state_dict(self) -> dict[str, Any]:
        return {"at": BERLIN}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_resume_without_time_zones_sets_no_checkpoint_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image without tzdata."""
    store, clock = Store(tmp_path), Clock()
    for step in (1, 2):
        store.save({"clock": clock}, step=step)
    with monkeypatch.context() as patched:
        patched.setattr(zoneinfo, "ZoneInfo", _none)
        with pytest.raises(RestoreError, match=r"'Europe/Berlin'.*The checkpoint is whole.*tzdata"):
            Store(tmp_path).load_latest_into({"clock": clock})
    assert [checkpoint.step for checkpoint in store.list()] == [1, 2]
    assert store.load_latest_into({"clock": clock}) is not None


def _none(key: str) -> None:
    raise zoneinfo.ZoneInfoNotFoundError(f"No time zone found with key {key}")


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"$device": "npu:3"}, "the device .npu:3."),
        ({"$datetime": "2020-01-01", "zone": "No/Where", "fold": 0}, "time zone .No/Where."),
        ({"$dtype": "float3_e1m1"}, "torch.float3_e1m1"),
        ({"$numpy_dtype": "<f32"}, "NumPy dtype '<f32'"),
    ],
)
def test_what_another_installation_wrote_is_named(tree: dict[str, Any], what: str) -> None:
    with pytest.raises(RestoreError, match=what):
        unflatten(tree, lambda _: torch.zeros(1))


@pytest.mark.parametrize(
    "tree",
    [
        {"$device": "../x"},
        {"$dtype": "a b"},
        {"$dtype": 3},
        {"$numpy_dtype": "x, y"},
        {"$timezone": "../../etc/passwd"},
    ],
)
def test_what_is_never_written_is_damage(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="never writes"):
        unflatten(tree, lambda _: torch.zeros(1))


def test_a_dtype_that_the_format_does_not_know_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TensorNotSavableError, match=r"bits8 has no place.*view\(torch.uint8\)"):
        Store(tmp_path).save({"w": torch.zeros(3, dtype=torch.uint8).view(torch.bits8)})
    assert set(saving._DTYPE_NAMES.values()) >= {"float32", "float8_e4m3fn", "bool", "complex64"}
