"""What can't be read may well be whole: nothing older is taken in its place, whoever asks for the newest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.test_recovery import cut, filled, newer_format, state

from keepstep import Store
from keepstep.errors import StoreError

Spoil = Callable[[Path, pytest.MonkeyPatch], None]


def written_by_a_newer_keepstep(path: Path, _: pytest.MonkeyPatch) -> None:
    newer_format(path)


def shut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses to open the manifest; the tests may run as root, whom no permissions keep out."""
    real = os.open

    def guarded(where: Any, *args: Any, **options: Any) -> int:
        if str(where) == str(path / "manifest.json"):
            raise PermissionError(13, "Permission denied", str(where))
        return real(where, *args, **options)

    monkeypatch.setattr(os, "open", guarded)


REFUSED: dict[str, tuple[Spoil, str]] = {
    "newer": (written_by_a_newer_keepstep, "upgrade keepstep"),
    "shut": (shut, "Permission denied"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_newest_is_the_same_whether_it_is_looked_for_or_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    filled(tmp_path, 3)
    spoil, reason = REFUSED[kind]
    spoil(tmp_path / "checkpoint_1", monkeypatch)
    store = Store(tmp_path)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 2
    cut("model.safetensors")(tmp_path / "checkpoint_2")
    told = []
    for ask in (store.latest, lambda: store.load_latest_into(state(0))):
        with pytest.raises(StoreError, match=f"{reason}.* no older checkpoint was taken") as caught:
            ask()
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert (tmp_path / "checkpoint_1").is_dir()
    lines = [line for line in caplog.text.splitlines() if "damaged" in line]
    assert lines
    assert all("checkpoint_2" in line for line in lines)
