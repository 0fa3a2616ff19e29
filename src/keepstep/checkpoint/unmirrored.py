"""Why a checkpoint could not be mirrored, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from keepstep.errors import DamagedCheckpointError, DirectoryNotOursError, MirrorError

__all__ = ["HOPELESS", "LASTING", "is_damage_here", "told"]

HOPELESS: Final = (DamagedCheckpointError, DirectoryNotOursError)
"""What would end in the same way if this process tried it again."""

LASTING: Final = (*HOPELESS, MirrorError)
"""What no later success of this process makes good: it stays to be told."""


def is_damage_here(error: Exception) -> bool:
    """Whether what was to be uploaded is damaged, and not what the mirror has under that name."""
    return isinstance(error, DamagedCheckpointError) and isinstance(error.path, Path)


def told(error: Exception, mirror: str, root: Path) -> MirrorError:
    """What is said to whoever waits for a mirror.

    Args:
        error: why something is not there.
        mirror: its address.
        root: the directory that it is the mirror of.
    """
    return MirrorError(f"not everything could be mirrored to {mirror}: {error}. {_outlook(error, root)}")


def _outlook(error: Exception, root: Path) -> str:
    if is_damage_here(error):
        return (
            f"This process does not try it again, and what {root} has of it may be the same bytes: `keepstep "
            f"verify {root}` says which checkpoints are damaged. The next save links to none of them"
        )
    if isinstance(error, HOPELESS):
        return f"It is safe in {root}; to try it again would not help"
    return (
        f"It is safe in {root}, and is tried again after the next save and when the next process writes to "
        "the store"
    )
