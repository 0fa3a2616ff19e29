"""Are a segment's tensors, byte for byte, those of a committed one?"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from keepstep.checkpoint.crew import in_threads
from keepstep.checkpoint.saving.staging import TensorBytes
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.outcome import Latch

__all__ = ["Comparison"]

_PROBES = 3
_THREADS = 3
_FEW = 2
"""So few tensors are compared by the caller, without threads."""


class Comparison:
    """The tensors of a segment, and the digests of another.

    Args:
        sources: its tensors.
        digests: what they have to be.
        known: digests of memory that has not been written to.
    """

    def __init__(self, sources: Sequence[TensorBytes], digests: Sequence[str], known: KnownDigests) -> None:
        self._pairs = sorted(zip(sources, digests, strict=True), key=lambda pair: pair[0].bytes)
        self._known = known

    def begins_alike(self) -> bool:
        """Whether a few small tensors are the same: of a segment that changes, one of them tells."""
        return all(source.matches(digest, self._known) for source, digest in self._pairs[:_PROBES])

    def ends_alike(self) -> bool:
        """Whether the others are the same."""
        # What is proved takes microseconds; threads would only wait for one another.
        known, rest_of_it = self._known, self._pairs[_PROBES:]
        unproved = [pair for pair in rest_of_it if not pair[0].provably_matches(pair[1], known)]
        rest = reversed(unproved)
        taking = threading.Lock()
        different = Latch()

        def compare() -> None:
            try:
                while not different.is_open:
                    with taking:
                        pair = next(rest, None)
                    if pair is None:
                        return
                    if not pair[0].matches(pair[1], known):
                        different.open()
            except BaseException:
                different.open()
                raise

        if len(unproved) < _FEW:
            compare()
        else:
            # Threads of their own: those that write have more to do, and whoever compares is waited for.
            for error in in_threads(compare, _THREADS, name="keepstep-compare", stop=different.open):
                raise error
        return not different.is_open
