"""What a restore is going to do, written down before anything is changed; or why it can't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from keepstep.checkpoint.format.boxes import Box
from keepstep.checkpoint.loading.reader import Reader
from keepstep.checkpoint.loading.sharing import Place, shared_memory_problems
from keepstep.errors import MismatchError
from keepstep.tree import address_of, shard_of, tensors_in, unflatten

__all__ = ["PLAIN_TENSORS", "Handed", "ObjectPath", "Plan", "tensor_address"]

ObjectPath = tuple[Any, ...]
"""Keys from the root to a live object."""

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
"""Kinds that hold all their elements; others may be distributed."""


@dataclass(frozen=True, slots=True)
class Handed:
    """An object that takes its state through its own load_state_dict."""

    path: ObjectPath
    owner: Any
    node: Any


@dataclass(slots=True)
class Plan:
    """Collected by a walk over the saved tree and the live objects.

    Attributes:
        reader: of the checkpoint.
        places: live tensors that are read into.
        handed_over: objects that load their own state.
        settling: decode what is set at the end, once all is read; each returns what sets it.
        fresh: addresses of tensors that are read into new memory.
        missing: what the live objects have and the checkpoint lacks.
        unexpected: what the checkpoint has and the live objects lack.
        different: one sentence for each other difference.
    """

    reader: Reader
    places: list[Place] = field(default_factory=list)
    handed_over: list[Handed] = field(default_factory=list)
    settling: list[Callable[[], Callable[[], None]]] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    _fresh_tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def differs(self, path: ObjectPath, how: str) -> None:
        """Note a difference of the live object at `path`."""
        self.different.append(f"{address_of(path) or 'the root'}: {how}")

    def take(self, path: ObjectPath, address: str, live: torch.Tensor) -> None:
        """The saved bytes go to the live tensor, or the part of a distributed one that this rank holds."""
        try:
            part = None if type(live) in PLAIN_TENSORS else shard_of(live)
        except (RuntimeError, ValueError) as error:  # says nothing about the checkpoint
            self.differs(
                path,
                f"the live distributed tensor can't say which part of it lies here ({error}); redistribute "
                "it to Shard or Replicate placements first",
            )
            return
        if part is None:
            self.places.append(Place(path, address, live))
        elif part[0].numel():
            self.places.append(Place(path, address, part[0], Box(part[1], tuple(part[0].shape))))

    def read_fresh(self, node: Any) -> None:
        """Read the tensors of a saved value into new memory, for `decode`."""
        self.fresh.update(tensors_in(node))

    def decode(self, node: Any) -> Any:
        """A saved value; its tensors were read by then."""
        return unflatten(node, self._fresh_tensors.__getitem__)

    def raise_if_it_differs(self) -> None:
        """Name every difference.

        Raises:
            MismatchError: there are some.
        """
        self.different += shared_memory_problems(self.reader, self.places)
        if self.missing or self.unexpected or self.different:
            raise MismatchError(
                f"{self.reader.place} does not fit the live objects; nothing was changed. Build the objects "
                "as they were when it was saved, or load a part of it, as "
                f'Checkpoint.open("{self.reader.place}").load_into({{"model": model}}, only="model")',
                missing=self.missing,
                unexpected=self.unexpected,
                different=self.different,
            )

    def settle(self) -> list[Callable[[], None]]:
        """Read and decode all values that are set at the end; what is left is to set them."""
        self._fresh_tensors.update(self.reader.fresh(self.fresh))
        return [decoded() for decoded in self.settling]


def tensor_address(node: Any) -> str | None:
    """Where a saved tensor is found; None if the value is none."""
    return node["$tensor"] if type(node) is dict and "$tensor" in node else None
