"""One save of torch.distributed.checkpoint, as the rank that coordinates it sees it."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence

from keepstep.checkpoint.dcp.memory import give_back, take
from keepstep.checkpoint.dcp.spots import Spot
from keepstep.checkpoint.saving.ranks import Plan, Shard
from keepstep.errors import UsageError
from keepstep.files import Files

__all__ = ["CoordinatedSave"]


class CoordinatedSave:
    """A save on its way, on the coordinator: one thread makes it from its beginning to its end.

    Attributes:
        memory: of the saves before.
        key: what all ranks hold.
        workspace: the unfinished checkpoint.
        invitation: to it.
    """

    def __init__(self, spot: Spot, files: Files, held: Sequence[Sequence[Shard]]) -> None:
        self._spot = spot
        self._over = False
        self._pid = os.getpid()
        self._thread = threading.current_thread()
        self._in_call = False
        with _guard:
            others = list(_under_way)
        for other in others:
            other.make_way()
        self.key = tuple(map(tuple, held))
        self.memory = take(spot, len(held))
        with _guard:
            _under_way.add(self)
        try:
            ranks = self.memory.ranks
            if not ranks.fits(self.key, (), ()):
                ranks.decide((), held)
            self.workspace = spot.reserve(files)
            with self.workspace.explained():
                self.workspace.check()
                self.workspace.open()
                self.invitation = self.workspace.invitation()
        except BaseException:
            self.discard()
            raise

    @property
    def plan(self) -> Plan:
        """Who writes what."""
        assert self.memory.ranks.plan is not None, "it was decided"
        return self.memory.ranks.plan

    def committed(self, resting: Mapping[str, str]) -> None:
        """The checkpoint is there, and the next one goes on from it; see `RankPlanner.learn`."""
        self.memory.ranks.learn(self.key, resting)
        self.memory.last = self.invitation
        self._end()

    def make_way(self, *, of_same_writer: bool = False) -> None:
        """End it if it failed on another rank, of which DCP tells nobody: its thread saves anew, or is gone.

        Args:
            of_same_writer: whether it is the writer of this save that is to save anew.

        Raises:
            UsageError: its thread is in the middle of it.
        """
        here = self._thread is threading.current_thread()
        works = self._in_call and os.getpid() == self._pid and self._thread.is_alive()
        if here and works:
            raise UsageError(
                "dcp.save was called in the middle of another one, by the handler of a signal. Let the "
                "handler take note of the signal, and save when the loop comes by"
            )
        if of_same_writer and works:
            raise UsageError(
                f"this StorageWriter is still saving {self._spot} on another thread: wait for what "
                "dcp.async_save returned, or give this save a writer of its own"
            )
        if here or of_same_writer or not self._thread.is_alive():
            self.discard()

    def check_thread(self) -> None:
        """See that it is the save of the thread that asks.

        Raises:
            UsageError: another thread has begun it with the same writer.
        """
        if self._thread is not threading.current_thread():
            raise UsageError(
                f"a save to {self._spot} was begun with this StorageWriter while another one went on: "
                "wait for what dcp.async_save returned, or give each save a writer of its own"
            )

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """DCP has called, and the writer is at work on this save."""
        self._in_call = True
        try:
            yield
        finally:
            self._in_call = False

    def discard(self) -> None:
        """Remove what was written; what was known before is true still."""
        if not self._over and os.getpid() == self._pid:  # a fork's parent sees to it
            self._over = True
            if hasattr(self, "workspace"):
                self.workspace.discard()
            self._end()

    def _end(self) -> None:
        self._over = True
        with _guard:
            _under_way.discard(self)
        give_back(self._spot, self.memory)


_under_way: weakref.WeakSet[CoordinatedSave] = weakref.WeakSet()
"""Saves that may not be over: a thread does one after the other."""
_guard = threading.RLock()
