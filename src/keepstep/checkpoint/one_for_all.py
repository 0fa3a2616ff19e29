"""What rank 0 does alone, however long it takes, while the other ranks wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, TypeVar

from keepstep.outcome import Outcome
from keepstep.world import World

__all__ = ["by_rank_0"]

_SIGN_EVERY_S: Final = 2.0
"""So often rank 0 says that it is at it; well below any time-out of ranks."""

T = TypeVar("T")


def by_rank_0(world: World, topic: str, work: Callable[[], T]) -> T | None:
    """Have rank 0 do something on a thread, and meet meanwhile, so that no time-out has to cover it.

    Args:
        world: the ranks; all of them call this.
        topic: of the meetings.
        work: is called on rank 0 alone.

    Returns:
        On rank 0 what `work` returned, on the others None.

    Raises:
        RankFailedError: on the other ranks: it failed. On rank 0 its own error is raised.
        RankMissingError: a rank is gone.
    """
    if world.size == 1:
        return work()
    outcome: Outcome[T] | None = None
    if world.rank == 0:
        outcome = Outcome()
        threading.Thread(target=outcome.settle, args=[work], name="keepstep-rank-0", daemon=True).start()
    while True:
        with world.meeting(topic) as meeting:
            meeting.collect(b"")
            # In the meeting: whatever interrupts rank 0 here is told to the others.
            ended = outcome is not None and outcome.wait(_SIGN_EVERY_S)
            if ended and outcome is not None:
                outcome.result()  # its error tells the others
            if meeting.broadcast(b"ended" if ended else b"") == b"ended":
                break
    return None if outcome is None else outcome.result()
