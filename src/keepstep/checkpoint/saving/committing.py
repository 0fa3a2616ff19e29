"""The manifest of what was written, and the commit. No torch."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from keepstep.checkpoint.format.manifest import FileEntry, Manifest, dump_manifest
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.checkpoint.saving.environment import describe_environment

__all__ = ["commit"]


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
