"""Which checkpoints wait to be mirrored, which is next, and which are overtaken. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keepstep.checkpoint.format.manifest import Manifest

__all__ = ["Upload", "Waiting"]


@dataclass(eq=False, slots=True)
class Upload:
    """A checkpoint that is to be mirrored.

    Attributes:
        directory: where its files were linked.
        manifest: of it.
        name: in the mirror.
        failed: an attempt failed; it waits until it is told to be tried again.
        hopeless: trying again in this process would end the same way.
    """

    directory: Path
    manifest: Manifest
    name: str
    failed: bool = False
    hopeless: bool = False

    @property
    def number(self) -> int:
        """The checkpoint's number."""
        return int(self.name.rpartition("_")[2])

    @property
    def must_go(self) -> bool:
        """Whether newer ones don't overtake it."""
        return bool(self.manifest.pinned or self.manifest.tags)


class Waiting:
    """Uploads in the order of their checkpoints. Whoever has it guards it by a lock.

    Args:
        most: how many may wait. If more do, the oldest that are neither tagged nor pinned are overtaken; the
            newest never is.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._uploads: list[Upload] = []

    def __len__(self) -> int:
        return len(self._uploads)

    @property
    def to_try(self) -> int:
        """How many have not failed."""
        return sum(not upload.failed for upload in self._uploads)

    @property
    def any_failed(self) -> bool:
        """Whether one waits that could not be uploaded, and will be tried again."""
        return any(upload.failed and not upload.hopeless for upload in self._uploads)

    def add(self, upload: Upload) -> list[Upload]:
        """Take one in; those that it overtakes are given back, and don't wait any more."""
        self.put_back(upload)
        may_go = [waiting for waiting in self._uploads[:-1] if not waiting.must_go]
        overtaken = may_go[: max(0, len(self._uploads) - self._most)]
        for late in overtaken:
            self._uploads.remove(late)
        return overtaken

    def put_back(self, upload: Upload) -> None:
        """Have one wait that was tried; it overtakes none."""
        self._uploads = sorted([*self._uploads, upload], key=lambda waiting: waiting.number)

    def take_next(self) -> Upload | None:
        """Take out the oldest that has not failed; None: there is none."""
        for upload in self._uploads:
            if not upload.failed:
                self._uploads.remove(upload)
                return upload
        return None

    def try_again(self) -> None:
        """Those that failed are tried again, if there is hope."""
        for upload in self._uploads:
            upload.failed = upload.hopeless

    def give_up(self) -> None:
        """None of them is tried again."""
        for upload in self._uploads:
            upload.failed = True

    def has(self, manifest_id: str) -> bool:
        """Whether a checkpoint waits."""
        return any(upload.manifest.id == manifest_id for upload in self._uploads)
