"""Checkpoints made in a moment, without torch: the same files as a save writes, of a few bytes each."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keepstep.checkpoint.format.manifest import (
    DATA_ALIGNMENT_BYTES,
    FileEntry,
    Manifest,
    TensorEntry,
    combine_digests,
    digest_of,
    dump_manifest,
    dump_state,
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
ENVIRONMENT: Mapping[str, Any] = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "host": "node-17",
    "command": ["train.py", "--name", "a b"],
    "git": {"commit": "23eccee041e83e23444371ab2c05707a621c7aff", "dirty": True},
}
TENSORS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "h.0.weight": ("float32", (4, 8)),
    "h.0.bias": ("float32", (4,)),
    "steps": ("int64", ()),
    "half": ("bfloat16", (3,)),
}
MANIFEST_KEYS = {"id", "created_at", "step", "epoch", "metrics", "tags", "pinned"} | {
    "parent",
    "run",
    "attempt",
    "bytes",
}
ITEMSIZE = {"float32": 4, "int64": 8, "bfloat16": 2}


def write_segment(
    directory: Path, group: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """One `<group>.safetensors` with recognisable bytes, and its index."""
    ordered = sorted(tensors.items(), key=lambda item: -ITEMSIZE[item[1][0]])
    sizes = {name: ITEMSIZE[dtype] * math.prod(shape) for name, (dtype, shape) in ordered}
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape) in ordered:
        offsets = [len(data), len(data) + sizes[name]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += (name.encode() * sizes[name])[: sizes[name]]
    text = json.dumps(header).encode()
    text = text.ljust(-(-(len(text) + 8) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES - 8)
    head = struct.pack("<Q", len(text)) + text
    index = {
        f"{group}/{name}": TensorEntry(
            dtype=dtype,
            shape=shape,
            offset=len(head) + (begin := header[name]["data_offsets"][0]),
            file=f"{group}.safetensors",
            bytes=sizes[name],
            digest=digest_of(data[begin : begin + sizes[name]]),
        )
        for name, (dtype, shape) in ordered
    }
    (directory / f"{group}.safetensors").write_bytes(head + data)
    digests = [digest_of(head), *(entry.digest or "" for entry in index.values())]
    entry = FileEntry(bytes=len(head + data), digest=combine_digests(digests), header_bytes=len(head))
    return entry, index


def write_checkpoint(
    directory: Path,
    *,
    number: int = 0,
    metrics: Mapping[str, float | int | str | bool] | None = None,
    tags: tuple[str, ...] = (),
    pinned: bool = False,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = TENSORS,
    environment: Mapping[str, Any] = ENVIRONMENT,
) -> Path:
    """A sound checkpoint with the groups `model` and `optimizer`, and one tied weight."""
    directory.mkdir(parents=True)
    files: dict[str, FileEntry] = {}
    index: dict[str, TensorEntry] = {}
    for group in ("model", "optimizer"):
        files[f"{group}.safetensors"], part = write_segment(directory, group, tensors)
        index |= part
    first = next(iter(tensors))
    shape = tensors[first][1]
    stride = tuple(1 if place == len(shape) - 1 else shape[-1] for place in range(len(shape)))
    index["model/tied"] = TensorEntry(
        dtype=tensors[first][0], shape=shape, offset=0, alias_of=f"model/{first}", stride=stride
    )
    state = dump_state({"model": {}, "optimizer": {}}, index)
    (directory / "state.json").write_bytes(state)
    files["state.json"] = FileEntry(bytes=len(state), digest=digest_of(state))
    manifest = Manifest(
        id=f"{number:016x}",
        created_at=(BEGIN + timedelta(minutes=number)).isoformat(),
        step=number * 100,
        epoch=number // 2,
        metrics={"val_loss": 4.0 / (number + 1), "accuracy": number / 1000} if metrics is None else metrics,
        tags=tags,
        pinned=pinned,
        parent=f"{number - 1:016x}" if number else None,
        run="305628e9ac23b9bd",
        attempt=1,
        environment=environment,
        files=files,
    )
    (directory / "manifest.json").write_bytes(dump_manifest(manifest))
    return directory


def write_store(root: Path, count: int, **details: Any) -> Path:
    """A store of `count` sound checkpoints."""
    for number in range(count):
        write_checkpoint(root / f"checkpoint_{number}", number=number, **details)
    (root / ".keepstep").mkdir(exist_ok=True, parents=True)
    return root
