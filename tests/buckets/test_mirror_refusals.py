"""What can't be read may well be whole: no mirror takes its place, and no mirror loses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from tests.buckets.test_mirror import mirrored, names
from tests.buckets.test_mirror_faults import cut, saved_and_mirrored
from tests.buckets.test_store import raw, state
from tests.checkpoint.test_recovery import newer_format
from tests.checkpoint.test_refused import REFUSED

from keepstep import Store
from keepstep.checkpoint import pulling
from keepstep.checkpoint.keeping.verify import Report
from keepstep.errors import MirrorError, StoreError

__all__ = ["mirrored"]

Open = Callable[..., Store]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_read_here_is_not_replaced_from_the_mirror(
    mirrored: Open, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    store.close()
    spoil, reason = REFUSED[kind]
    spoil(store.path / "checkpoint_1", monkeypatch)
    for ask in (lambda: mirrored().load_latest_into(state(9)), lambda: mirrored().latest()):
        with pytest.raises(StoreError, match=f"{reason}.* not set aside"):
            ask()
    assert not (store.path / ".keepstep" / "damaged").exists()


def test_what_a_newer_keepstep_put_into_the_mirror_is_not_passed_over(
    mirrored: Open, bucket_store: Open
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    newer_format(store.path / "checkpoint_1")
    data = (store.path / "checkpoint_1" / "manifest.json").read_bytes()
    obstore.put(raw(bucket_store()), "checkpoint_1/manifest.json", data)
    elsewhere = mirrored("elsewhere")
    for ask in (elsewhere.latest, lambda: elsewhere.load_latest_into(state(9))):
        with pytest.raises(StoreError, match=r"upgrade keepstep.* no older checkpoint was taken"):
            ask()
    assert names(elsewhere) == []


def test_a_copy_that_can_not_be_verified_is_not_called_damaged(
    mirrored: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_and_mirrored(mirrored(), 2)

    def refuse(place: Path, **_: Any) -> Report:
        return Report(path=place, problems=("Too many open files",), bytes=0, refused=True)

    monkeypatch.setattr(pulling, "verify_checkpoint", refuse)
    with pytest.raises(StoreError, match=r"Too many open files.* no older checkpoint was taken"):
        mirrored("elsewhere").latest()


def test_an_upload_that_can_not_be_read_is_kept_for_later(mirrored: Open) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    store.close()
    left = store.path / ".keepstep" / "uploads"
    for number in range(2):
        shutil.copytree(store.path / f"checkpoint_{number}", left / f"checkpoint_{number}.left_over")
    newer_format(left / "checkpoint_0.left_over")
    cut(left / "checkpoint_1.left_over" / "manifest.json")
    with pytest.raises(MirrorError, match="upgrade keepstep"):
        saved_and_mirrored(mirrored(), 1)
    assert [path.name for path in left.iterdir()] == ["checkpoint_0.left_over"]
