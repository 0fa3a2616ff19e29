"""Did a write slip past on some rank, while the last checkpoint was copied behind the training?"""

from __future__ import annotations

from keepstep.checkpoint.pending import PendingSave
from keepstep.train.settings.config import CheckpointPolicy
from keepstep.world import World

__all__ = ["Slips"]


class Slips:
    """Asks all ranks, once for each save: one that was spoiled on one rank is lost to all of them.

    By the step after the one that it was of, each rank has passed the gate and knows of its own writes.

    Args:
        world: the ranks; one by itself need not be asked.
        policy: how they copy.
    """

    def __init__(self, world: World, policy: CheckpointPolicy) -> None:
        self._world = world
        self._asks = world.size > 1 and policy.staging != "awaited"
        self._begun_at: int | None = None

    def begun(self, step: int) -> None:
        """A save of this step has begun, on all ranks."""
        self._begun_at = step

    def found(self, pending: PendingSave | None, step: int, *, lost: bool) -> bool:
        """Whether the last save was spoiled, on any rank; every rank calls it at the same steps.

        Args:
            pending: the save; None if it is known what became of it, or it could not be begun.
            step: optimizer steps done.
            lost: it is known that it was.
        """
        if not self._asks or self._begun_at is None or step <= self._begun_at:
            return False
        self._begun_at = None
        spoiled = lost or (pending is not None and pending.spoiled)
        return not self._world.agree(not spoiled, "checkpoint(): was the last one spoiled?")
