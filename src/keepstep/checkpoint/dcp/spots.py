"""Where a checkpoint of `dcp.save` is to lie: a directory, or an address in a bucket."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepstep.checkpoint.place.backend import GuestWorkspace, HostWorkspace
from keepstep.checkpoint.place.joined import JoinedWorkspace
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.checkpoint.place.registry import check_scheme, is_address, open_bucket
from keepstep.errors import UsageError
from keepstep.files import Files

__all__ = ["Spot", "is_place"]


@dataclass(frozen=True, slots=True)
class Spot:
    """One checkpoint's place.

    Attributes:
        parent: the directory or address that it lies in.
        name: what it is called there.
        options: of a bucket, see `Store`.
    """

    parent: str
    name: str
    options: Mapping[str, Any] | None = field(default=None, repr=False)  # it may hold a secret

    @classmethod
    def of(cls, path: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Spot:
        """The place that a path or an address means.

        Raises:
            UsageError: an address without a name below the bucket, or of a kind that keepstep does not know.
        """
        if not is_address(path):
            final = Path(path).resolve()
            return cls(str(final.parent), final.name, options)
        address = os.fspath(path).rstrip("/")
        check_scheme(address)
        parent, _, name = address.rpartition("/")
        if "://" not in parent or parent.endswith("/"):
            raise UsageError(
                f"{os.fspath(path)} is a whole bucket; a checkpoint needs a name of its own below it, as "
                "s3://bucket/run/step_100"
            )
        return cls(parent, name, options)

    def __str__(self) -> str:
        return f"{self.parent}/{self.name}" if self.in_bucket else str(Path(self.parent, self.name))

    @property
    def in_bucket(self) -> bool:
        """Whether it is an address."""
        return is_address(self.parent)

    def reserve(self, files: Files) -> HostWorkspace:
        """An unfinished checkpoint there, for the rank that commits; `files`: how the disk is changed."""
        if self.in_bucket:
            return open_bucket(self.parent, self.options).reserve_named(self.name)
        return LocalWorkspace(files, Path(self.parent, self.name))

    def guest(self, files: Files) -> GuestWorkspace:
        """The unfinished checkpoint of another rank at the same place, for those that write into it."""
        return open_bucket(self.parent, self.options).guest() if self.in_bucket else JoinedWorkspace(files)


def is_place(text: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint can lie there: a directory's name, or an address of a kind that keepstep knows."""
    try:
        Spot.of(text, None)
    except UsageError:
        return False
    return True
