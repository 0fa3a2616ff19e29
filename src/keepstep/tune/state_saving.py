"""States as checkpoints of a trial; loaded when the first one is saved, since it needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from keepstep.checkpoint.engine import Engine, Order
from keepstep.checkpoint.format.manifest import STATE_NAME, Manifest
from keepstep.checkpoint.format.parse import read_state
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.place.backend import HostWorkspace
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.errors import DamagedCheckpointError

__all__ = ["StateSaver"]

_MEMORY_BYTES: Final = 64 << 20


class StateSaver:
    """Saves states; what did not change is linked to the one before."""

    def __init__(self) -> None:
        self._engine = Engine(_MEMORY_BYTES)

    def follow(self, place: Place, manifest: Manifest) -> None:
        """Go on from a checkpoint of the same directory."""
        if STATE_NAME not in manifest.files:
            return
        try:
            tensors = read_state(place, manifest).tensors
        except DamagedCheckpointError:
            return  # then nothing is linked to it
        self._engine.follow(source_of(place).name, manifest, tensors)

    def save(
        self, reserve: Callable[[], HostWorkspace], state: Any, said: Description, lineage: Lineage
    ) -> Manifest:
        """Commit a state; durable on return.

        Raises:
            StateError: it can't be saved as it is.
            StoreError: the place refuses.
        """
        order = Order(state=state, description=said, lineage=lineage)
        return self._engine.save(reserve, order).write()
