"""What a flattened state consists of, and which leaf types the user has added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from keepstep.errors import UsageError

__all__ = [
    "ALL_DTYPES",
    "DTYPES",
    "FACTORIES",
    "MAX_DEPTH",
    "Codec",
    "Flat",
    "Leaf",
    "Stateful",
    "address_of",
    "codecs_by_name",
    "codecs_by_type",
    "has_codec",
    "is_stateful",
    "local_part",
    "register_codec",
    "shard_of",
    "type_name",
]

MAX_DEPTH = 100
"""Levels of nesting that a state may have; Python's own stack holds no more than 1000 calls."""

FACTORIES: dict[str, Callable[[], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "set": set,
}
"""Factories of a defaultdict that can be written down."""


@runtime_checkable
class Stateful(Protocol):
    """What PyTorch calls a stateful object: it can say its state and take it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def is_stateful(value: object) -> bool:
    """Whether `value` is a live object (not a class) with both methods."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bit"))
}
"""Every dtype whose tensors have plain bytes, by name."""

ALL_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
"""Every dtype, by name."""


def shard_of(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]] | None:
    """What this rank holds of a distributed tensor, and where it begins; None for any other tensor.

    Asks by the protocol that torch.distributed.checkpoint asks by, which DTensor answers.

    Raises:
        RuntimeError, ValueError: the rank holds sums that are still to be added up, or several parts.
    """
    chunks = getattr(tensor, "__create_chunk_list__", None)
    if chunks is None:
        return None
    (chunk,) = chunks()
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    at = tuple(chunk.offsets)
    return local.detach(), at if len(at) == tensor.dim() else (0,) * tensor.dim()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this rank holds of a tensor: all of it, but for distributed ones."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return tensor
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


class Leaf(NamedTuple):
    """One tensor of a state. A tuple, since they are made anew for each save.

    Attributes:
        address: unique in the state: group, "/", name.
        group: the root key it lies under; a group becomes a file.
        name: its path below the group, joined by dots: the exact name that a module's state dict has.
        tensor: the live tensor, detached; shares memory with what was given.
        frozen: whether it is a module's parameter that no gradient reaches.
        counted: whether torch counts what is written to it (not so for memory of NumPy's).
        shard: for a part of a distributed tensor: where it begins, and the shape of the whole.
        whole: the distributed tensor that it is a part of: what is written through that, torch counts there.
    """

    address: str
    group: str
    name: str
    tensor: torch.Tensor
    frozen: bool = False
    counted: bool = True
    shard: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    whole: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Flat:
    """A flattened state."""

    tree: Any
    leaves: list[Leaf]


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """How one leaf type is written and read; see `register_codec`."""

    type: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


codecs_by_type: dict[type, Codec] = {}
codecs_by_name: dict[str, Codec] = {}


def register_codec(
    type: type,  # noqa: A002
    name: str,
    encode: Callable[[Any], Any],
    decode: Callable[[Any], Any],
) -> None:
    """Teach keepstep a leaf type.

    Args:
        type: the exact class; subclasses need their own codec.
        name: written into the checkpoint; must be registered again before it is loaded.
        encode: value -> a state of types that keepstep stores (dict, list, tensor, str ...).
        decode: the inverse. It runs when a checkpoint is loaded, so it must not execute what it reads.

    Raises:
        UsageError: if the name is taken by another type.
    """
    taken = codecs_by_name.get(name)
    if taken is not None and taken.type is not type:
        raise UsageError(
            f"codec name {name!r} is taken by {type_name(taken.type)}; "
            f"choose another name for {type_name(type)}"
        )
    codec = Codec(type=type, name=name, encode=encode, decode=decode)
    codecs_by_type[type] = codec
    codecs_by_name[name] = codec


def has_codec(value: object) -> bool:
    """Whether values of exactly this class are written by a codec."""
    return type(value) in codecs_by_type


def type_name(kind: type) -> str:
    """A class by its full name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def address_of(path: tuple[Any, ...]) -> str:
    """How a place in a state is written in messages: "optimizer/state.0.exp_avg"."""
    return (
        "/".join((str(path[0]), ".".join(map(str, path[1:])))) if len(path) > 1 else "".join(map(str, path))
    )
