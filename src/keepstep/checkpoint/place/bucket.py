"""A bucket prefix that holds the checkpoints of one run, and who writes to it.

Keys are those of a directory: `checkpoint_12/manifest.json`. A checkpoint exists from the moment its manifest
does. docs/decisions/0010 says why each step is the way it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Final

from keepstep.checkpoint.format.manifest import CHECKPOINT_NAME, MANIFEST_NAME, Manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.place.backend import checkpoint_name
from keepstep.checkpoint.place.bucket_joined import JoinedBucketWorkspace
from keepstep.checkpoint.place.bucket_named import OF_ATTEMPTS, NamedWorkspace, attempts_in, publish_decided
from keepstep.checkpoint.place.bucket_reading import (
    DAMAGED,
    BucketSource,
    FoundLike,
    Listing,
    ObjectsLike,
    as_key,
    as_name,
    is_old,
)
from keepstep.checkpoint.place.bucket_writer import BucketWriter
from keepstep.checkpoint.place.bucket_writing import (
    CLAIM_NAME,
    BucketWorkspace,
    content_of,
    explained_bucket,
)
from keepstep.checkpoint.place.claimant import Claimant, parse_claim, this_process
from keepstep.checkpoint.place.in_use import keys_in_use
from keepstep.errors import DamagedCheckpointError, DirectoryNotOursError, StoreBusyError

__all__ = ["BucketBackend", "ObjectsLike"]

_NAMES: Final = re.compile(rb"checkpoint_[0-9]+")

log = logging.getLogger(__name__)


class BucketBackend:
    """A `Backend` that is the objects below one prefix.

    Args:
        objects: below the prefix.
    """

    scan_threads = 8

    def __init__(self, objects: ObjectsLike) -> None:
        self._objects = objects
        self._manifests: dict[tuple[str, str], bytes] = {}
        self._in_use = keys_in_use(objects.address)
        self._lock = threading.RLock()
        self._writer = BucketWriter(objects)
        self._owner: Claimant | None = None
        self._next: int | None = None

    def __str__(self) -> str:
        return self._objects.address

    def __repr__(self) -> str:
        return f"BucketBackend({self._objects.address!r})"

    # ------------------------------------------------------------------------------------ looking

    def _listing(self) -> Listing:
        found = {found.key: found for found in self._objects.list()}
        for key, tag in [kept for kept in list(self._manifests) if kept[0] not in found]:
            self._manifests.pop((key, tag), None)  # a run may commit, and delete, a million
        return Listing(found)

    def _source(self, prefix: str, listing: Listing | None = None) -> BucketSource:
        return BucketSource(self._objects, prefix, listing, self._manifests)

    def at(self, name: str) -> BucketSource:
        """The checkpoint of that name, there or not."""
        return self._source(name)

    def checkpoints(self) -> list[tuple[int, Place]]:
        return self._committed(self._listing())

    def _committed(self, listing: Listing, place: str = "") -> list[tuple[int, Place]]:
        """By rising number; of two names of one number the shorter counts."""
        found = self._all_committed(listing, place)
        numbered = {_number(source.name) or 0: source for source in found}
        return [(number, numbered[number]) for number in sorted(numbered)]

    def _all_committed(self, listing: Listing, place: str = "") -> list[BucketSource]:
        """Those with the longest names first."""
        found = []
        for key, seen in listing.found.items():
            name, _, file = key.removeprefix(place).partition("/")
            if CHECKPOINT_NAME.match(name) and key.startswith(place) and file == MANIFEST_NAME and seen.bytes:
                found.append(self._source(f"{place}{name}", listing))
        return sorted(found, key=lambda source: -len(source.name))

    def names_begun(self) -> list[str]:
        """Of all checkpoints here, those included that were never committed."""
        return sorted({key.partition("/")[0] for key in self._listing().found if _number(key) is not None})

    def set_aside_before(self) -> list[tuple[int, Place]]:
        return self._committed(Listing({f.key: f for f in self._objects.list(DAMAGED)}), f"{DAMAGED}/")

    def next_number(self) -> int:
        seen = (_number(key.removeprefix(f"{DAMAGED}/")) for key in self._listing().found)
        return max((number for number in seen if number is not None), default=-1) + 1

    def explained(
        self, place: Place | None = None, doing: str = "saving"
    ) -> contextlib.AbstractContextManager[None]:
        return explained_bucket(place if place is not None else self, doing)

    # ------------------------------------------------------------------------------------ writing

    def claim(self) -> None:
        with self._lock, explained_bucket(self, "writing to"):
            if self._owner == this_process():
                return
            self._writer.claim()
            self._owner = this_process()
            self._next = None
            self._sweep()

    def reserve(self) -> BucketWorkspace:
        with self._lock, explained_bucket(self):
            number = self._next if self._next is not None else self.next_number()
            while not self._objects.create(f"{checkpoint_name(number)}/{CLAIM_NAME}", self._claim()):
                number += 1  # another process was faster, or an answer was lost: that number is burned
            self._next = number + 1
        return self._workspace(checkpoint_name(number))

    def guest(self) -> JoinedBucketWorkspace:
        return JoinedBucketWorkspace(self._objects, self._in_use)

    def reserve_for(self, name: str, checkpoint_id: str, shared: Collection[str] = ()) -> BucketWorkspace:
        """A workspace for a checkpoint that exists elsewhere, under its own name.

        What an earlier attempt at the same checkpoint has uploaded stays and counts.

        Args:
            name: of the checkpoint.
            checkpoint_id: of its manifest.
            shared: those of its files that a checkpoint of that name, deleted since, may have left here, as
                others name them with the same content.

        Raises:
            DirectoryNotOursError: that name belongs to another checkpoint here, or has been one's.
        """
        key, claim = f"{name}/{CLAIM_NAME}", self._claim(checkpoint=checkpoint_id)
        with explained_bucket(self):
            there = {found.key for found in self._objects.list(name)}
            if key not in there:
                # First: whoever meets a claim of its own takes all that lies there for its own.
                if there - {f"{name}/{as_key(file)}" for file in shared}:
                    raise self._belongs_to_another(name)
                self._objects.create(key, claim)
            if parse_claim(self._objects.get(key))[1].get("checkpoint") != checkpoint_id:
                raise self._belongs_to_another(name)
            if key in there:
                self._take_up_again(name, claim)
        return self._workspace(name, keeps_parts=True)

    def _take_up_again(self, name: str, claim: bytes) -> None:
        """Have a checkpoint uploaded after all whose upload was given up because it had rested for a day.

        Nobody can be at the old attempt any more. The claim is renewed so that this one counts as young.
        """
        found = {found.key.removeprefix(f"{name}/"): found for found in self._objects.list(name)}
        mark = found.pop(MANIFEST_NAME, None)
        if mark is not None and not mark.bytes and is_old(found):
            self._objects.delete([f"{name}/{MANIFEST_NAME}"])
            self._objects.put(f"{name}/{CLAIM_NAME}", claim)

    def _belongs_to_another(self, name: str) -> DirectoryNotOursError:
        return DirectoryNotOursError(
            errno.EEXIST,
            f"{self}/{name} belongs to another checkpoint already, of another run perhaps. Give "
            "each run a mirror of its own",
        )

    def reserve_named(self, name: str) -> NamedWorkspace:
        """A workspace under a name that the caller has chosen; what others have begun there is given up.

        Raises:
            DirectoryNotOursError: a checkpoint lies there, or something else.
            StoreBusyError: another process is writing there.
        """
        with explained_bucket(self):
            return NamedWorkspace(self._objects, self._source(name), self._in_use)

    def reserve_in_place_of(self, name: str) -> BucketWorkspace:
        """A workspace under a name that the caller alone writes; what lies there goes first.

        For one of several processes that share a place by agreement: it need not claim it.
        """
        with explained_bucket(self):
            self.delete_unclaimed(self._source(name))
            claim, key = self._claim(), f"{name}/{CLAIM_NAME}"
            if not self._objects.create(key, claim) and content_of(self._objects, key) != claim:
                raise StoreBusyError(
                    f"{self}/{name} is being written by another process, one that was taken for dead "
                    "perhaps. It was left alone"
                )
        return self._workspace(name, is_writer=lambda: content_of(self._objects, key) == claim)

    def _workspace(
        self, name: str, *, keeps_parts: bool = False, is_writer: Callable[[], bool] | None = None
    ) -> BucketWorkspace:
        return BucketWorkspace(
            self._objects,
            self._source(name),
            is_writer=is_writer or self._writer.is_me,
            in_use=self._in_use,
            keeps_parts=keeps_parts,
        )

    def _claim(self, **more: object) -> bytes:
        return this_process().dump(token=secrets.token_hex(8), **more)

    def release(self, workspace: object) -> None:
        if isinstance(workspace, BucketWorkspace):
            workspace.discard()

    def holds(self, place: Place) -> bool:
        return isinstance(place, BucketSource) and str(place) == f"{self}/{place.name}"

    def free_bytes(self) -> None:
        """A bucket has no end that it could tell."""

    # ----------------------------------------------------------------------------------- removing

    def delete(self, place: Place) -> None:
        assert isinstance(place, BucketSource)
        self.claim()
        with explained_bucket(place, "deleting"):
            self._writer.check()
            if not place.exists():
                raise FileNotFoundError(
                    errno.ENOENT, "it was deleted already", f"{place.prefix}/{MANIFEST_NAME}"
                )
            self._delete(place, self._keys_of(place))

    def _delete(self, place: BucketSource, doomed: set[str] | None) -> None:
        """Delete a checkpoint and these objects, or all that lie there, but for those that others name."""
        if doomed is None:
            doomed = {found.key for found in self._objects.list(place.prefix)}
        attempts = self._take_back(place.prefix, doomed)
        with self._in_use.deleting(doomed) as free:
            self._objects.delete([f"{place.prefix}/{MANIFEST_NAME}"])  # from here on it is no checkpoint
            self._objects.delete(free - self._named(self._listing()))
        self._objects.delete([f"{home}/{CLAIM_NAME}" for home in (place.prefix, *attempts)])

    def _take_back(self, prefix: str, keys: Iterable[str]) -> list[str]:
        """Have attempts that were decided count as given up: nobody who saves under that name publishes them.

        Returns:
            Their prefixes.
        """
        below = (key.removeprefix(f"{prefix}/") for key in keys if key.startswith(f"{prefix}/"))
        attempts = [f"{prefix}/{attempt}" for attempt in attempts_in(below)]
        for attempt in attempts:
            self._objects.put(f"{attempt}/{MANIFEST_NAME}", b"")
        return attempts

    def delete_unclaimed(self, place: BucketSource) -> None:
        """Delete what lies under a name, finished or not, without becoming the one process that writes here.

        The caller sees to it that nobody links to it: the writer links only to the newest checkpoint that
        it has committed, and that one is not deleted while it runs.
        """
        with explained_bucket(place, "deleting"):
            left = {found.key for found in self._objects.list(place.prefix)}
            if left:
                self._delete(place, left | (self._keys_of(place) or set()))

    def _keys_of(self, place: BucketSource) -> set[str] | None:
        """The objects that a checkpoint's manifest names; None if it can't be read."""
        try:
            return _keys(place, read_manifest(place))
        except DamagedCheckpointError:
            return None

    def _named(self, listing: Listing) -> set[str]:
        """Every object that a remaining manifest names; those set aside count."""
        named: set[str] = set()
        for place in ("", f"{DAMAGED}/"):
            for source in self._all_committed(listing, place):
                try:
                    manifest = read_manifest(source)
                except DamagedCheckpointError:
                    named |= self._perhaps_named(source, listing)
                else:
                    named |= _keys(self._source(source.name), manifest)
        return named

    def _perhaps_named(self, source: BucketSource, listing: Listing) -> set[str]:
        """All that a manifest that can't be read may name: a person, or a newer keepstep, may read it."""
        try:
            said = self._objects.get(f"{source.prefix}/{MANIFEST_NAME}")
        except FileNotFoundError:
            return set()
        homes = {name.decode() for name in _NAMES.findall(said)}
        found = [(key, *key.partition("/")[::2]) for key in listing.found]
        return {
            key
            for key, home, file in found
            if home == source.name or (home in homes and json.dumps(as_name(file)).encode() in said)
        }

    def set_aside(self, place: Place) -> Place:
        assert isinstance(place, BucketSource)
        self.claim()
        self._writer.check()
        key = f"{place.prefix}/{MANIFEST_NAME}"
        target = self._source(f"{DAMAGED}/{place.name}")
        self._objects.put(f"{target.prefix}/{MANIFEST_NAME}", self._objects.get(key))
        self._take_back(place.prefix, [found.key for found in self._objects.list(place.prefix)])
        self._objects.delete([key])
        return target

    def _sweep(self) -> None:
        """Remove what dead attempts, and deletions that were cut off, have left.

        Only the one writer gets here, so that every attempt of another process is over: it is given up first,
        by taking the key of its manifest.
        """
        listing = self._listing()
        files: defaultdict[str, dict[str, FoundLike]] = defaultdict(dict)
        for key, found in listing.found.items():
            name, _, file = key.partition("/")
            if CHECKPOINT_NAME.match(name):
                files[name][file] = found
        committed = {name for name, inside in files.items() if _is_committed(inside)}
        aside = {source.name for source in self._all_committed(listing, f"{DAMAGED}/")}
        left = sorted(files.keys() - committed - aside)
        newest = max((_number(name) or 0 for name in committed), default=-1)
        doomed = [f"{name}/{file}" for name in left for file in files[name]]
        with self._in_use.deleting(doomed) as free:
            keep = set(doomed) - free | (self._named(self._listing()) if left else set())
            for name in left:
                if self._give_up(name, files[name]):
                    forget = (_number(name) or 0) < newest and is_old(files[name])
                    self._clear(name, files[name], keep, forget=forget)

    def _give_up(self, prefix: str, files: dict[str, FoundLike]) -> bool:
        """See to it that an attempt can't be committed any more; False if it stays."""
        attempts = attempts_in(files)
        if MANIFEST_NAME in files or not (attempts or CLAIM_NAME in files):
            return True  # given up before, or the rest of a deletion
        if publish_decided(self._objects, self._source(prefix), sorted(attempts)):
            return False
        for claim in files.keys() & {CLAIM_NAME, *(f"{attempt}/{CLAIM_NAME}" for attempt in attempts)}:
            who, said = parse_claim(self._objects.get(f"{prefix}/{claim}"))
            resumable = "checkpoint" in said and not is_old(files)
            named = attempts or OF_ATTEMPTS in said  # its process need not be the one that writes here
            if resumable or (who is not None and (who.lives_here if named else who.is_here)):
                return False
        return self._objects.create(f"{prefix}/{MANIFEST_NAME}", b"")

    def _clear(self, prefix: str, files: dict[str, FoundLike], named: set[str], *, forget: bool) -> None:
        """Remove an attempt's objects; the marks that burn its number only once nobody can be at it."""
        doomed = {f"{prefix}/{file}" for file in files.keys() - {MANIFEST_NAME, CLAIM_NAME}} - named
        if doomed:
            log.info("removing %s/%s, left unfinished by a process that died", self, prefix)
            self._objects.delete(doomed)
        if forget:
            self._objects.delete([f"{prefix}/{MANIFEST_NAME}", f"{prefix}/{CLAIM_NAME}"])


def _is_committed(files: dict[str, FoundLike]) -> bool:
    return MANIFEST_NAME in files and files[MANIFEST_NAME].bytes > 0


def _number(key: str) -> int | None:
    match = CHECKPOINT_NAME.match(key.partition("/")[0])
    return int(match[1]) if match else None


def _keys(source: BucketSource, manifest: Manifest) -> set[str]:
    return {source.key_of(name, entry) for name, entry in manifest.files.items()}
