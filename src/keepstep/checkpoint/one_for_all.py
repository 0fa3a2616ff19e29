"""What rank 0 does alone, however long it takes, while the other ranks wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from keepstep.checkpoint.crew import Crew
from keepstep.outcome import Outcome
from keepstep.world import World

__all__ = ["by_rank_0"]

_SIGN_EVERY_S: Final = 2.0
"""So often rank 0 says that it is at it, and looks whether all wait; well below any time-out of ranks."""

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
        RankFailedError: it failed, or a rank was interrupted while it waited. Where that happened its own
            error is raised.
        RankMissingError: a rank is gone.
        NoThreadError: the system gives rank 0 no more threads.
    """
    if world.size == 1:
        return work()
    outcome: Outcome[T] | None = None
    while True:
        # All in the meeting: whatever ends rank 0's part here is told to the others.
        with world.meeting(topic) as meeting:
            if world.rank == 0 and outcome is None:
                outcome = _begun(work)
            meeting.collect(b"")
            ended = outcome is not None and outcome.wait(_SIGN_EVERY_S)
            if ended and outcome is not None:
                outcome.result()  # its error tells the others
            meeting.check()  # who was interrupted meanwhile comes to no other meeting
            if meeting.broadcast(b"ended" if ended else b"") == b"ended":
                break
    return None if outcome is None else outcome.result()


def _begun(work: Callable[[], T]) -> Outcome[T]:
    crew = Crew(1, "keepstep-rank-0", daemon=True)
    outcome = crew.submit(work)
    crew.close()
    return outcome
