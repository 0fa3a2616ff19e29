"""The unfinished checkpoint of another rank in a bucket, for those who upload their share of it."""

from __future__ import annotations

import json

from keepstep.checkpoint.place.bucket_reading import BucketSource, ObjectsLike
from keepstep.checkpoint.place.bucket_writing import CLAIM_NAME, BucketWorkspace, content_of
from keepstep.checkpoint.place.in_use import KeysInUse
from keepstep.errors import BucketError

__all__ = ["JoinedBucketWorkspace"]


class JoinedBucketWorkspace(BucketWorkspace):
    """A `GuestWorkspace`: this rank uploads objects, and rank 0 puts the manifest.

    To discard it is to give the whole attempt up, as rank 0 does: only then may objects be removed.

    Args:
        objects: of the store.
        in_use: keeps deletions of this process from what is linked.
    """

    def __init__(self, objects: ObjectsLike, in_use: KeysInUse) -> None:
        super().__init__(objects, BucketSource(objects, ""), is_writer=lambda: False, in_use=in_use)
        self._claim = b""
        self.is_over = True  # nothing to give up before it is known what

    def accept(self, invitation: str) -> None:
        prefix, self.within, claim = json.loads(invitation)
        self.final, self._claim = BucketSource(self._objects, prefix), claim.encode()
        self.is_over = False

    def open(self) -> None:
        """See that the claim is there: all ranks have to reach one bucket."""
        if content_of(self._objects, f"{self._home}/{CLAIM_NAME}") != self._claim:
            raise BucketError(
                f"{self.final} is not what rank 0 has begun: all ranks have to reach the same bucket. Look "
                "at the address, endpoint and credentials that this rank was given"
            )

    def leave(self) -> None:
        self._end()
