"""Names that are hard to write down, in files that other tools must read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keepstep import Store
from keepstep.checkpoint.saving import layout

NAMES = [
    "é",
    "日本",
    "a\nb",
    "\x00",
    "x" * 3000,
    "",
    "__metadata__",
    "\x7f",
    "😀",
    'q"\\',
    "half a pair \ud800",
]


def test_odd_names_are_read_by_safetensors(tmp_path: Path) -> None:
    state = {"m": {name: torch.full((2,), float(index)) for index, name in enumerate(NAMES)}}
    checkpoint = Store(tmp_path).save(state)
    assert checkpoint.verify().sound
    assert {float(tensor[0]) for tensor in load_file(checkpoint.path / "m.safetensors").values()} == set(
        map(float, range(len(NAMES)))
    )
    loaded = checkpoint.load()["m"]
    assert [float(loaded[name][0]) for name in NAMES] == list(map(float, range(len(NAMES))))


def test_a_header_is_cut_by_its_length_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character that is no ASCII takes six or twelve bytes of it."""
    monkeypatch.setattr(layout, "_HEADER_LIMIT_BYTES", 60_000)
    checkpoint = Store(tmp_path).save({"m": {"日" * 500 + str(index): torch.ones(1) for index in range(40)}})
    segments = sorted(checkpoint.path.glob("m-*.safetensors"))
    assert len(segments) > 1
    assert all(int.from_bytes(segment.read_bytes()[:8], "little") < 64_000 for segment in segments)
    index = json.loads((checkpoint.path / "m.safetensors.index.json").read_text())["weight_map"]
    assert {name for segment in segments for name in load_file(segment)} == set(index)


def test_a_store_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = Store("store")
    store.save({"x": 1})
    monkeypatch.chdir(tmp_path / "there")
    store.save({"x": 2})
    assert [checkpoint.name for checkpoint in Store(tmp_path / "here" / "store").list()] == [
        "checkpoint_0",
        "checkpoint_1",
    ]
