"""Nested state <-> typed JSON plus a flat table of tensors. Never pickle.

`flatten` turns a state (nested dict, list, tuple of tensors, arrays and plain values, or live objects
with `state_dict`/`load_state_dict`) into

* a *tree*: JSON in which every non-tensor value is written out exactly and a tensor is a reference,
* *leaves*: the tensors, each with an address that is unique in the state ("model/h.0.weight").

`unflatten` is its inverse. Plain JSON types stand for themselves; everything else is an object with one
key that begins with "$". docs/format.md lists them all.
"""

from __future__ import annotations

from keepstep.tree.decode import unflatten
from keepstep.tree.encode import flatten
from keepstep.tree.leaf import (
    DTYPES,
    Flat,
    Leaf,
    Stateful,
    address_of,
    has_codec,
    is_stateful,
    local_part,
    register_codec,
    shard_of,
    type_name,
)
from keepstep.tree.navigate import elements_of, inside_object, items_of, select, tensors_in

__all__ = [
    "DTYPES",
    "Flat",
    "Leaf",
    "Stateful",
    "address_of",
    "elements_of",
    "flatten",
    "has_codec",
    "inside_object",
    "is_stateful",
    "items_of",
    "local_part",
    "register_codec",
    "select",
    "shard_of",
    "tensors_in",
    "type_name",
    "unflatten",
]
