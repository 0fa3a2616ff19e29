"""Whether to save at this step: all ranks have to give the same answer."""

from __future__ import annotations

from keepstep.train.pace.pacing import Pacer
from keepstep.train.pace.schedule import Due
from keepstep.train.settings.config import CheckpointPolicy
from keepstep.world import World

__all__ = ["Decision"]


class Decision:
    """Asks the pacer, and lets rank 0 decide where clocks and disks do.

    Where nothing but the step counts, each rank finds the same answer by itself. Elsewhere rank 0 tells the
    others what it decided, and for how many further steps nobody need ask: half as many as fit before a
    checkpoint may be due.

    Args:
        world: the ranks.
        policy: when checkpoints are due.
    """

    def __init__(self, world: World, policy: CheckpointPolicy) -> None:
        self._world = world
        by_clock = (policy.every_s, policy.max_overhead, policy.mean_time_between_failures_s)
        alone = all(value is None for value in by_clock) and policy.when_busy != "skip"
        self._alone = world.size == 1 or alone
        self._quiet_until = 0

    def take(self, pacer: Pacer, step: int, *, busy: bool) -> Due:
        """Decide at the entrance of `checkpoint()`; every rank calls it at the same steps.

        Args:
            pacer: of this rank.
            step: optimizer steps done.
            busy: a save is being written.
        """
        due = pacer.ask(step, busy=busy)
        if self._alone:
            return due
        if step < self._quiet_until:
            return Due.NO
        name, quiet_until = self._world.broadcast((due.name, step + pacer.quiet_steps()))
        self._quiet_until = quiet_until
        return Due[name]

    def anew(self) -> None:
        """Another state was restored: ask at the next step."""
        self._quiet_until = 0
