"""Checkpoints in a bucket under names that the caller chooses, and may choose again.

Each attempt at such a name has a prefix of its own below it, which nobody uses again:
`step_100/attempt_0123456789abcdef/model.safetensors`. Its manifest there is what decides: put create-only, it
says that the attempt is whole; with no bytes, that it was given up. Only what was decided is published, as
`step_100/manifest.json`, create-only as well, and only what was given up is removed.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Iterable
from typing import Any, Final

from keepstep.checkpoint.format.manifest import CHECKPOINT_NAME, MANIFEST_NAME, WITHIN
from keepstep.checkpoint.place.bucket_reading import (
    DAMAGED,
    BucketSource,
    FoundLike,
    ObjectsLike,
    is_old,
)
from keepstep.checkpoint.place.bucket_writing import CLAIM_NAME, BucketWorkspace, content_of
from keepstep.checkpoint.place.claimant import Claimant, parse_claim, this_process
from keepstep.checkpoint.place.in_use import KeysInUse
from keepstep.errors import BucketError, DirectoryNotOursError, StoreBusyError, StoreError

__all__ = ["OF_ATTEMPTS", "NamedWorkspace", "attempts_in", "publish_decided"]

_FIRST: Final = "attempt_"
OF_ATTEMPTS: Final = "attempts"
"""What the claim on a name says that is given to attempts, and to no save of a store."""


def attempts_in(files: Iterable[str]) -> set[str]:
    """The attempts among what lies below a name."""
    parts = (file.partition("/") for file in files)
    return {first for first, _, rest in parts if rest and first.startswith(_FIRST) and WITHIN.match(first)}


class NamedWorkspace(BucketWorkspace):
    """A `HostWorkspace` under a name; what others have begun there is given up first.

    Args:
        objects: of the place.
        final: where the checkpoint will lie.
        in_use: tells the saves of this process of each other.

    Raises:
        DirectoryNotOursError: a checkpoint lies there, or something else.
        StoreBusyError: this process, or another of this machine, is writing there.
    """

    def __init__(self, objects: ObjectsLike, final: BucketSource, in_use: KeysInUse) -> None:
        super().__init__(
            objects,
            final,
            is_writer=lambda: content_of(objects, self._claim_key) == self._claim,
            in_use=in_use,
            attempt=f"{_FIRST}{secrets.token_hex(8)}",
        )
        self._claim = this_process().dump()
        if not in_use.begin(final.prefix):
            raise StoreBusyError(
                f"{final} is being saved by this process already. Wait for that save; if it failed on "
                "another rank, call reset() of its writer; or choose another name"
            )
        try:
            self._begin()
        except BaseException:
            in_use.end(final.prefix)
            raise

    @property
    def _claim_key(self) -> str:
        return f"{self._home}/{CLAIM_NAME}"

    def _begin(self) -> None:
        """Of two that begin at once each one sees the other: both claim before they look."""
        _Name(self._objects, self.final).check()  # writes nothing where something else lies
        of_attempts = this_process().dump(**{OF_ATTEMPTS: True})
        self._objects.create(f"{self.final.prefix}/{CLAIM_NAME}", of_attempts)  # a store gives it to no save
        self._objects.put(self._claim_key, self._claim)
        try:
            stands = not self._objects.create(self._claim_key, self._claim)
            _Name(self._objects, self.final, but=self.within).give_up_all()
            if self._objects.size(f"{self._home}/{MANIFEST_NAME}") is not None:
                raise self._taken_over()  # by one that began at the same time
            if not stands:
                raise self._objects.refuses_create(self._claim_key)
        except BaseException:
            with contextlib.suppress(StoreError, OSError):
                self._objects.delete([self._claim_key])
            raise

    def _decided(self, manifest: bytes) -> None:
        if not _publish(self._objects, self.final, manifest):
            raise self._taken_over()

    def _end(self) -> None:
        if not self.is_over:
            super()._end()
            self._in_use.end(self.final.prefix)


class _Name:
    """What lies under a name.

    Args:
        objects: of the place.
        final: the name's.
        but: an attempt that is not looked at.
    """

    def __init__(self, objects: ObjectsLike, final: BucketSource, but: str | None = None) -> None:
        self._objects = objects
        self._final = final
        found = {found.key.removeprefix(f"{final.prefix}/"): found for found in objects.list(final.prefix)}
        self._found: dict[str, FoundLike] = {
            file: seen for file, seen in found.items() if file.partition("/")[0] != but
        }
        self._attempts = sorted(attempts_in(self._found))

    def check(self) -> None:
        """Refuse what is committed, of somebody else, or being written by a process of this machine."""
        found = self._found
        if MANIFEST_NAME in found and found[MANIFEST_NAME].bytes:
            raise self._is_committed()
        ours = CLAIM_NAME in found and OF_ATTEMPTS in self._said(CLAIM_NAME)[1]
        claims = [f"{attempt}/{CLAIM_NAME}" for attempt in self._attempts]
        for claim in claims if ours else [CLAIM_NAME, *claims]:
            holder = self._holder(claim)
            if holder is not None and holder.lives_here and not holder.is_here:
                raise StoreBusyError(
                    f"{self._final} is being written by {holder}. Wait for it, stop it, or "
                    "choose another name"
                )
        if MANIFEST_NAME in found or (CLAIM_NAME in found and not ours) or self._is_set_aside():
            raise DirectoryNotOursError(
                errno.EEXIST,
                f"{self._final} is of a store, which has given that number to a save of its own. "
                "Nothing was changed. Choose another name",
            )
        if found.keys() - {CLAIM_NAME} and not self._attempts:
            raise DirectoryNotOursError(
                errno.EEXIST,
                f"{self._final} was not written by keepstep (it holds {min(found)}). Nothing was "
                "changed. Choose another name",
            )

    def _holder(self, claim: str) -> Claimant | None:
        """Who has claimed what is not decided yet."""
        mark = f"{claim.removesuffix(CLAIM_NAME)}{MANIFEST_NAME}"
        if claim not in self._found or mark in self._found:
            return None
        return self._said(claim)[0]

    def _said(self, claim: str) -> tuple[Claimant | None, dict[str, Any]]:
        return parse_claim(content_of(self._objects, f"{self._final.prefix}/{claim}") or b"")

    def _is_set_aside(self) -> bool:
        """Whether a store has put the manifest of what lies there among the damaged ones."""
        key = f"{DAMAGED}/{self._final.prefix}/{MANIFEST_NAME}"
        return bool(CHECKPOINT_NAME.match(self._final.prefix)) and self._objects.size(key) is not None

    def give_up_all(self) -> None:
        """See to it that no attempt of another can be committed any more, then remove what it wrote.

        Raises:
            DirectoryNotOursError: one had been decided. It is published now, if that was lacking.
        """
        self.check()
        for attempt in self._attempts:
            self._give_up(f"{self._final.prefix}/{attempt}/{MANIFEST_NAME}")
        for attempt in self._attempts:
            mark = f"{attempt}/{MANIFEST_NAME}"
            files = {file: seen for file, seen in self._found.items() if file.startswith(f"{attempt}/")}
            doomed = files.keys() if is_old(files) else files.keys() - {mark}
            self._objects.delete([f"{self._final.prefix}/{file}" for file in doomed])

    def _give_up(self, mark: str) -> None:
        while not self._objects.create(mark, b""):
            decided = content_of(self._objects, mark)
            if decided:
                _publish(self._objects, self._final, decided)
                raise DirectoryNotOursError(
                    errno.EEXIST,
                    f"an earlier save to {self._final} had been decided, and is published now: a whole "
                    "checkpoint lies there. Nothing of this save was written. Choose another name for it",
                )
            if decided is not None:
                return

    def _is_committed(self) -> DirectoryNotOursError:
        return DirectoryNotOursError(
            errno.EEXIST,
            f"there is a checkpoint at {self._final}, and a bucket can't replace it in one step. "
            "Nothing was changed. Choose another name, or delete all that lies below it first",
        )


def _publish(objects: ObjectsLike, final: BucketSource, manifest: bytes) -> bool:
    """Put what was decided where readers look; False if another one lies there."""
    key = f"{final.prefix}/{MANIFEST_NAME}"
    try:
        created = objects.create(key, manifest)  # <- commit: after this line the checkpoint exists
    except BucketError:
        if content_of(objects, key) != manifest:
            raise  # who saves under this name next does it, as it was decided
        return True
    return created or content_of(objects, key) == manifest


def publish_decided(objects: ObjectsLike, final: BucketSource, attempts: Iterable[str]) -> bool:
    """Publish the attempt below a name that had been decided, if there is one; whether there was."""
    for attempt in attempts:
        decided = content_of(objects, f"{final.prefix}/{attempt}/{MANIFEST_NAME}")
        if decided:
            _publish(objects, final, decided)
            return True
    return False
