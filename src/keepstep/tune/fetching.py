"""Checkpoints of a bucket, brought to a directory of this machine and verified. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import xxhash

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, FileEntry, Manifest, dump_manifest
from keepstep.checkpoint.format.names import HANDED_OVER, is_handed_over
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.errors import DamagedCheckpointError, DigestError

__all__ = ["fetch_checkpoint", "fetch_handed_over"]

_CHUNK_BYTES: Final = 8 << 20


def fetch_handed_over(place: Place, manifest: Manifest, target: Path) -> None:
    """Copy the files that the user handed over into a directory.

    Raises:
        DamagedCheckpointError: they are not what was committed.
    """
    for name in manifest.directories:
        (target / name.removeprefix(HANDED_OVER).lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name, entry in manifest.files.items():
        if is_handed_over(name):
            digest = _fetch(place, name, entry, target / name.removeprefix(f"{HANDED_OVER}/"))
            if digest != entry.digest:
                raise DigestError(place, f"{name} has the digest {digest}, but {entry.digest} was committed")


def fetch_checkpoint(place: Place, manifest: Manifest, target: Path) -> None:
    """Copy a whole checkpoint into a directory.

    Raises:
        DamagedCheckpointError: it is not what was committed.
    """
    for name in manifest.directories:
        (target / name).mkdir(parents=True, exist_ok=True)
    for name, entry in manifest.files.items():
        _fetch(place, name, entry, target / name)
    files = {name: replace(entry, within=None) for name, entry in manifest.files.items()}
    (target / MANIFEST_NAME).write_bytes(dump_manifest(replace(manifest, files=files)))
    report = verify_checkpoint(target)
    if not report.sound:
        raise DamagedCheckpointError(place, "; ".join(report.problems))


def _fetch(place: Place, name: str, entry: FileEntry, target: Path) -> str:
    """One file; the digest of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher = xxhash.xxh3_128()
    file = source_of(place).open(name, entry)
    try:
        with target.open("wb") as copy:
            for begin in range(0, entry.bytes, _CHUNK_BYTES):
                chunk = file.read(begin, min(_CHUNK_BYTES, entry.bytes - begin))
                hasher.update(chunk)
                copy.write(chunk)
    finally:
        file.close()
    return hasher.hexdigest()
