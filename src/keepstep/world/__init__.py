"""The ranks of a run: how many there are, which one this is, and what they do together.

This package is the whole of what the rest of keepstep knows about other processes. A part that has to
agree with other ranks asks a `World`; with one process that is `OneRank`, whose answers are trivial, so
no caller needs to ask whether it runs alone.

Before any tensor travels, the ranks call the roll (`roll_call.py`): each says what it is about to do, and
if that differs, or one does not come, all raise. Checkpointing does without tensors: it goes over the
key-value store that ranks found each other with, see `keepstep.meetings`.
"""

from __future__ import annotations

from keepstep.world.one import OneRank
from keepstep.world.protocol import Reduction, World
from keepstep.world.ranks import DEFAULT_TIMEOUT_S, Ranks, join_ranks, joined_group, leave_ranks

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "OneRank",
    "Ranks",
    "Reduction",
    "World",
    "join_ranks",
    "joined_group",
    "leave_ranks",
]
