"""What a store does beside saving and loading: room, deletion, the scrub, quarantine. No torch."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

from keepstep.checkpoint.format.known import KnownManifests
from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.source import Place, place_exists
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.preflight import Preflight
from keepstep.checkpoint.keeping.pruning import Which, check_committed, prune
from keepstep.checkpoint.keeping.quarantine import set_aside
from keepstep.checkpoint.keeping.retention import Retention, is_number
from keepstep.checkpoint.keeping.scrub import SCRUB_BYTES_PER_S, Scrubber
from keepstep.checkpoint.keeping.verify import FileState, Report, verify_checkpoint
from keepstep.checkpoint.place.backend import Backend
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, StoreError, UsageError

__all__ = ["Bystander", "Upkeep"]

log = logging.getLogger(__name__)


class Upkeep:
    """Keeps the place of a store in order.

    Args:
        backend: the place.
        scrub_interval_s: from one verification of an older checkpoint to the next, in seconds; None: never.
        scrub_bytes_per_s: how fast the scrub reads at most; None: 50 MB/s.

    Raises:
        UsageError: a value is impossible.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        scrub_interval_s: float | None = None,
        scrub_bytes_per_s: float | None = None,
    ) -> None:
        for name, value in (("scrub_interval_s", scrub_interval_s), ("scrub_bytes_per_s", scrub_bytes_per_s)):
            if value is not None and not (is_number(value) and value > 0):
                raise UsageError(f"{name} is {value!r}; expected a number of more than 0, or None")
        self._interval_s = scrub_interval_s
        self._bytes_per_s = SCRUB_BYTES_PER_S if scrub_bytes_per_s is None else scrub_bytes_per_s
        self._backend = backend
        self._preflight = Preflight()
        self._known = KnownManifests()
        self._scrubber: Scrubber | None = None
        self._found_damage = False

    def before_save(self, needed_bytes: int, retention: Retention, of: Which) -> None:
        """Make room for the next checkpoint as far as the rules allow, or warn."""
        self._preflight.check(self._backend, needed_bytes, retention, of)

    def after_commit(self, place: Place, manifest: Manifest, retention: Retention, of: Which) -> None:
        """Delete what the rules drop, if the new checkpoint can stand in for it. Never raises."""
        if retention.keeps_all:
            return
        try:
            check_committed(place, manifest, self._known)
            prune(self._backend, retention, of, self._known)
        except DamagedCheckpointError as error:
            log.error("%s was committed, but can't be relied on; nothing older was deleted", error)
        except StoreError as error:  # the new checkpoint is whole; what could not go now goes next time
            log.warning("old checkpoints could not be deleted: %s", error)

    def delete(self, name: str, place: Place | None = None) -> None:
        """Delete the checkpoint of this name; see `Store.delete`.

        Args:
            name: of the checkpoint.
            place: where the caller saw it; None: here.
        """
        entry = catalog.find(self._backend, name)
        if place is not None and not self._backend.holds(place):
            raise CheckpointNotFoundError(
                errno.ENOENT, f"{place} is not in {self._backend}; delete it through its own store"
            )
        try:
            self._backend.delete(entry.path)
        except StoreError as error:
            if place_exists(entry.path) or not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise CheckpointNotFoundError(errno.ENOENT, f"{entry.path} was deleted meanwhile") from error

    def claim(self) -> None:
        """Become the one process that writes here; the scrub begins."""
        self._backend.claim()
        if self._interval_s is not None and self._scrubber is None:
            self._scrubber = Scrubber(
                self._backend,
                interval_s=self._interval_s,
                bytes_per_s=self._bytes_per_s,
                found=self._found,
            )
            self._scrubber.start()

    def stop(self) -> None:
        """End the scrub."""
        if self._scrubber is not None:
            self._scrubber.stop()

    def verify(self, *, quick: bool) -> Sequence[Report]:
        """Verify every checkpoint, oldest first; a file that several share is read once."""
        known: set[FileState] = set()
        reports = [
            verify_checkpoint(entry.path, quick=quick, known=known) for entry in catalog.scan(self._backend)
        ]
        if any(not report.sound for report in reports):
            self.note_damage()
        return reports

    def note_damage(self) -> None:
        """A file here is damaged: the next save is to link to none."""
        self._found_damage = True

    def _found(self, place: Place, report: Report) -> None:
        self.note_damage()
        self.set_aside(place, "; ".join(report.problems))

    def found_damage(self) -> bool:
        """Whether damage was found since this was last asked: nothing may be linked to it."""
        found, self._found_damage = self._found_damage, False
        return found

    def set_aside(self, place: Place, problem: str) -> None:
        """Move a damaged checkpoint out of the way, loudly; what can't be moved is passed over."""
        log.error("the checkpoint %s is damaged and is set aside: %s", place, problem)
        try:
            self._backend.claim()
            set_aside(self._backend, place)
        except (OSError, StoreError) as refused:  # read-only, or another's: passing it over is enough
            log.warning("%s could not be set aside: %s", place, refused)


class Bystander(Upkeep):
    """The upkeep of ranks beside rank 0, which does it for all."""

    def before_save(self, needed_bytes: int, retention: Retention, of: Which) -> None:
        """Rank 0 looks."""

    def after_commit(self, place: Place, manifest: Manifest, retention: Retention, of: Which) -> None:
        """Rank 0 deletes."""

    def claim(self) -> None:
        """Rank 0 writes for all."""

    def set_aside(self, place: Place, problem: str) -> None:
        """Rank 0 does."""
