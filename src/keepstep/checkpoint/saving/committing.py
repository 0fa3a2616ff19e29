"""The manifest of what was written, and the commit. No torch."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keepstep.checkpoint.collector import collector_paused
from keepstep.checkpoint.format.manifest import (
    STATE_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    digest_of,
    dump_manifest,
    dump_state,
)
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.checkpoint.saving.environment import describe_environment

__all__ = ["Content", "commit", "publish"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a checkpoint consists of once its segments are written.

    Attributes:
        tree: the encoded state.
        tensors: the index, by address.
        files: entries of what has been written.
        small: small files that are still to be written, by name.
        ranks: the encoded state of each rank's own; None if there is none.
        world_size: how many ranks saved.
    """

    tree: Any
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    small: Mapping[str, bytes]
    ranks: Sequence[Any] | None = None
    world_size: int = 1


def commit(
    workspace: Workspace,
    files: Mapping[str, FileEntry],
    said: Description,
    lineage: Lineage,
    *,
    directories: Sequence[str] = (),
    world_size: int = 1,
) -> Manifest:
    """Commit a checkpoint of files that were written.

    Args:
        workspace: that holds them.
        files: what was written, by name.
        said: by the user.
        lineage: which run writes it, and after which checkpoint.
        directories: empty ones that the user handed over.
        world_size: how many ranks saved.
    """
    if workspace.within is not None:
        files = {
            name: replace(entry, within=entry.within or workspace.within) for name, entry in files.items()
        }
    manifest = Manifest(
        id=secrets.token_hex(8),
        created_at=dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        step=said.step,
        epoch=said.epoch,
        metrics=said.metrics,
        tags=said.tags,
        pinned=said.pinned,
        parent=lineage.parent,
        run=lineage.run,
        attempt=lineage.attempt,
        environment={**describe_environment(), "world_size": world_size, **said.environment},
        files=files,
        directories=tuple(directories),
    )
    workspace.commit(dump_manifest(manifest))
    return manifest


def publish(workspace: Workspace, content: Content, said: Description, lineage: Lineage) -> Manifest:
    """Write state.json and the manifest, and commit."""
    files = dict(content.files)
    with collector_paused():
        state = dump_state(content.tree, content.tensors, content.ranks)
    for name, data in {**content.small, STATE_NAME: state}.items():
        workspace.write_file(name, data)
        files[name] = FileEntry(bytes=len(data), digest=digest_of(data))
    return commit(workspace, files, said, lineage, world_size=content.world_size)
