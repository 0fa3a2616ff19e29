"""Are a segment's tensors, byte for byte, those of a committed one?"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from keepstep.checkpoint.crew import Crew
from keepstep.checkpoint.saving.staging import TensorBytes
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.outcome import Latch, Outcome, wait_for_all

__all__ = ["is_unchanged"]

_PROBES = 3
"""So many small tensors are compared before the rest is: of a segment that changes, one of them tells."""
_HELPERS = 2


def is_unchanged(
    sources: Sequence[TensorBytes], digests: Sequence[str], known: KnownDigests, crew: Crew
) -> bool:
    """Compare the tensors of a segment with the digests of another.

    Args:
        sources: its tensors.
        digests: what they have to be.
        known: digests of memory that has not been written to.
        crew: threads that help with hashing.
    """
    order = sorted(range(len(sources)), key=lambda n: sources[n].bytes)
    if not all(sources[n].matches(digests[n], known) for n in order[:_PROBES]):
        return False
    # What is proved takes microseconds; threads would only wait for one another.
    unproved = [n for n in reversed(order[_PROBES:]) if not sources[n].provably_matches(digests[n], known)]
    rest = iter(unproved)
    taking = threading.Lock()
    different = Latch()

    def compare() -> None:
        try:
            while not different.is_open:
                with taking:
                    n = next(rest, None)
                if n is None:
                    return
                if not sources[n].matches(digests[n], known):
                    different.open()
        except BaseException:
            different.open()
            raise

    helping: list[Outcome[None]] = []
    try:
        for _ in range(min(_HELPERS, len(unproved) - 1)):
            helping.append(crew.submit(compare))  # noqa: PERF401  (if one is refused, the others count)
        compare()
    except BaseException:
        different.open()  # the others need not go on
        raise
    finally:
        wait_for_all(helping)
    for outcome in helping:
        outcome.result()
    return not different.is_open
