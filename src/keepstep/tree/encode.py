"""A live state -> typed JSON and tensors."""

from __future__ import annotations

import base64
import collections
import datetime as dt
import math
import pathlib
import struct
import zoneinfo
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from keepstep.errors import StateStructureError, TensorNotSavableError, UnsupportedTypeError
from keepstep.tree.leaf import (
    DTYPES,
    FACTORIES,
    MAX_DEPTH,
    Flat,
    Leaf,
    address_of,
    codecs_by_type,
    is_stateful,
    shard_of,
    type_name,
)

__all__ = ["flatten"]

_EXACT_JSON_INTEGER = 2**53


def flatten(state: Any) -> Flat:
    """Split a state into typed JSON and tensors.

    Live objects are asked for their `state_dict()`; tensors are referenced, not copied.

    Raises:
        UnsupportedTypeError: a leaf of a type that is not stored, with its place and the ways out.
        StateStructureError: the state contains itself or is nested deeper than 100 levels.
        TensorNotSavableError: a tensor without plain bytes (meta, sparse, quantized, subclass).
    """
    flattener = _Flattener()
    try:
        tree = flattener.encode(state, ())
    except RecursionError:
        raise StateStructureError(
            f"the state is nested too deep for the stack that is left here (at most {MAX_DEPTH} levels); "
            "flatten it, or save from a less deeply nested call"
        ) from None
    return Flat(tree=tree, leaves=flattener.leaves)


@dataclass(slots=True)
class _Flattener:
    leaves: list[Leaf] = field(default_factory=list)
    addresses: set[str] = field(default_factory=set)
    open_containers: set[int] = field(default_factory=set)
    frozen: set[int] = field(default_factory=set)

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        encoder = _SCALARS.get(kind)
        if encoder is not None:
            return encoder(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return {"$tensor": self.add_tensor(value, path)}
        if kind in codecs_by_type:
            codec = codecs_by_type[kind]
            return {"$codec": codec.name, "value": self.inside(value, path, lambda: codec.encode(value))}
        container = _CONTAINERS.get(kind)
        if container is not None:
            return self.nested(value, path, container)
        if isinstance(value, np.ndarray | np.generic):
            return self.encode_numpy(value, path)
        if isinstance(value, np.dtype):
            return self.encode_numpy_dtype(value, path)
        if isinstance(value, torch.Tensor) and hasattr(value, "__create_chunk_list__"):
            return {"$tensor": self.add_shard(value, path)}
        if isinstance(value, torch.Tensor):
            raise TensorNotSavableError(_SUBCLASS.format(place=_place(path), type=type_name(kind)))
        if is_stateful(value):
            if isinstance(value, torch.nn.Module):
                self.frozen.update(_address_of(p) for p in value.parameters() if not p.requires_grad)
            return {"$object": type_name(kind), "state": self.inside(value, path, value.state_dict)}
        raise UnsupportedTypeError(
            _UNSUPPORTED.format(place=_place(path), type=type_name(kind), value=_short(value))
        )

    def inside(self, owner: Any, path: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        return self.nested(owner, path, lambda flattener, _, below: flattener.encode(make(), below))

    def nested(self, value: Any, path: tuple[Any, ...], encode: _ContainerEncoder) -> Any:
        if id(value) in self.open_containers:
            raise StateStructureError(
                f"the state contains itself at {_place(path)} (a {type_name(type(value))}); "
                "a state must be a tree: break the cycle before saving"
            )
        if len(self.open_containers) >= MAX_DEPTH:
            raise StateStructureError(
                f"the state is nested deeper than {MAX_DEPTH} levels at {_place(path[:4])}...; "
                "flatten it before saving"
            )
        self.open_containers.add(id(value))
        try:
            return encode(self, value, path)
        finally:
            self.open_containers.discard(id(value))

    def add_tensor(self, tensor: torch.Tensor, path: tuple[Any, ...], *, counted: bool = True) -> str:
        _refuse_unsavable(tensor, path)
        group, name = (str(path[0]), ".".join(map(str, path[1:])) or "value") if path else ("state", "value")
        address, n = f"{group}/{name}", 1
        while address in self.addresses:  # {0: x, "0": y} and {"a.b": x, "a": {"b": y}} read alike
            n += 1
            address = f"{group}/{name}~{n}"
        self.addresses.add(address)
        frozen = bool(self.frozen) and tensor.data_ptr() in self.frozen
        counted = counted and not tensor.is_inference()
        held = tensor.detach()  # keeps the memory, should `tensor.data` be replaced meanwhile
        self.leaves.append(Leaf(address, group, address[len(group) + 1 :], held, frozen, counted))
        return address

    def add_shard(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> str:
        try:
            part = shard_of(tensor)
        except (RuntimeError, ValueError) as error:
            raise TensorNotSavableError(
                f"cannot save {_place(path)}: this distributed tensor can't say which part of it lies here "
                f"({error}); redistribute it to Shard or Replicate placements first"
            ) from error
        assert part is not None
        address = self.add_tensor(part[0], path, counted=not tensor.is_inference())
        self.leaves[-1] = self.leaves[-1]._replace(shard=(part[1], tuple(tensor.shape)), whole=tensor)
        return address

    def encode_numpy(self, value: np.ndarray[Any, Any] | np.generic, path: tuple[Any, ...]) -> Any:
        dtype = value.dtype
        scalar = isinstance(value, np.generic)
        plain = type(value) in {np.ndarray, np.memmap, dtype.type} and _is_told_by_its_name(dtype)
        if not plain or not (dtype.itemsize or scalar):
            kind = f"{type_name(type(value))} of dtype {dtype}"
            raise UnsupportedTypeError(
                _UNSUPPORTED.format(place=_place(path), type=kind, value=_short(value))
            )
        if scalar:
            data = value.tobytes()[: dtype.itemsize]  # NumPy gives an empty string a zero of its own
            return {"$numpy_scalar": base64.b64encode(data).decode(), "dtype": dtype.str}
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        tensor = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
        native = _torch_dtype_of_numpy(dtype)
        if native is not None:
            tensor = tensor.view(native).reshape(value.shape)
        address = self.add_tensor(tensor, path, counted=False)
        return {"$ndarray": address, "dtype": dtype.str, "shape": list(value.shape)}

    def encode_numpy_dtype(self, value: np.dtype[Any], path: tuple[Any, ...]) -> Any:
        if not _is_told_by_its_name(value):
            raise UnsupportedTypeError(
                f"cannot save {_place(path)}: the NumPy dtype {_short(value)} has fields, a shape or Python "
                "objects; only dtypes of plain numbers, strings and dates can be written down"
            )
        return {"$numpy_dtype": value.str}

    def encode_hashable(self, value: Any, path: tuple[Any, ...], what: str) -> Any:
        """A key or an item of a set: what it comes back as must be hashable too, and no tensor."""
        if type(value) in _PLAIN or type(value) is int:
            return self.encode(value, path)
        known = len(self.leaves)
        encoded = self.encode(value, path)
        if len(self.leaves) != known or _holds_object(encoded):
            raise UnsupportedTypeError(
                f"cannot save {_place(path[:-1])}: {what} holds a tensor or a live object, {_short(value)}; "
                "use a str, int or tuple instead"
            )
        return encoded


_ContainerEncoder = Callable[["_Flattener", Any, tuple[Any, ...]], Any]


def _place(path: tuple[Any, ...]) -> str:
    return repr(address_of(path)) if path else "the root of the state"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (a foreign __repr__ may raise anything; the message must still come)
        text = object.__repr__(value)
    return text if len(text) <= 80 else text[:77] + "..."


_UNSUPPORTED = (
    "cannot save {place}: it is a {type}, {value}. keepstep stores tensors, NumPy arrays, plain Python "
    "values and objects with state_dict/load_state_dict, and never pickles. Give the class those two "
    "methods, or register a codec for it with keepstep.register_codec, or leave it out of the state"
)
_SUBCLASS = (
    "cannot save {place}: a {type} may hold more than plain bytes. Save tensor.as_subclass(torch.Tensor), or "
    "register a codec for the class with keepstep.register_codec"
)


def _refuse_unsavable(tensor: torch.Tensor, path: tuple[Any, ...]) -> None:
    if tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested):
        return
    if tensor.is_meta:
        what, way_out = (
            "is on the meta device and has no values",
            "materialize it first (to_empty, then load values)",
        )
    elif tensor.is_quantized:
        what, way_out = (
            f"is quantized ({tensor.dtype})",
            "save tensor.int_repr() with its scale and zero point",
        )
    elif tensor.is_nested:
        raise TensorNotSavableError(
            f"cannot save {_place(path)}: it is a nested tensor; save tensor.unbind(), or values and offsets"
        )
    else:
        what, way_out = f"has layout {tensor.layout}", "save tensor.to_dense(), or its indices and values"
    raise TensorNotSavableError(
        f"cannot save {_place(path)}: this tensor of shape {tuple(tensor.shape)} {what}; {way_out}"
    )


def _torch_dtype_of_numpy(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The torch dtype of the same bytes, or None (strings, dates, big-endian numbers ...)."""
    if dtype.kind not in "biufc" or not dtype.isnative:
        return None
    return DTYPES.get(dtype.name)


def _is_told_by_its_name(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype.str` says all of it: no fields, no shape, no Python objects, no foreign type."""
    return not dtype.hasobject and np.dtype(dtype.str) == dtype


def _holds_object(node: Any) -> bool:
    if type(node) is dict:
        return "$object" in node or any(map(_holds_object, node.values()))
    return type(node) is list and any(map(_holds_object, node))


def _encode_int(value: int) -> Any:
    return value if -_EXACT_JSON_INTEGER <= value <= _EXACT_JSON_INTEGER else {"$int": hex(value)}


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return {"$float": struct.pack(">d", value).hex() if math.isnan(value) else repr(value)}


def _encode_timezone(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key is not None:
        return zone.key
    if type(zone) is dt.timezone:
        seconds = zone.utcoffset(None).total_seconds()
        name = zone.tzname(None)
        return seconds if name == dt.timezone(dt.timedelta(seconds=seconds)).tzname(None) else [seconds, name]
    raise UnsupportedTypeError(
        f"cannot save a datetime whose time zone is a {type_name(type(zone))}; "
        "use datetime.timezone or zoneinfo.ZoneInfo"
    )


def _encode_datetime(value: dt.datetime) -> Any:
    naive = value.replace(tzinfo=None, fold=0).isoformat()
    return {"$datetime": naive, "zone": _encode_timezone(value.tzinfo), "fold": value.fold}


def _encode_time(value: dt.time) -> Any:
    naive = value.replace(tzinfo=None, fold=0).isoformat()
    return {"$time": naive, "zone": _encode_timezone(value.tzinfo), "fold": value.fold}


def _address_of(parameter: torch.Tensor) -> int:
    """Where its elements lie; those on this rank of a distributed one."""
    local = getattr(parameter, "to_local", None)
    return parameter.data_ptr() if local is None else int(local().data_ptr())


_PLAIN = frozenset({str, bool, type(None)})
_SCALARS: dict[type, Callable[[Any], Any]] = {
    int: _encode_int,
    float: _encode_float,
    complex: lambda v: {"$complex": [_encode_float(v.real), _encode_float(v.imag)]},
    bytes: lambda v: {"$bytes": base64.b64encode(v).decode()},
    bytearray: lambda v: {"$bytearray": base64.b64encode(v).decode()},
    dt.datetime: _encode_datetime,
    dt.date: lambda v: {"$date": v.isoformat()},
    dt.time: _encode_time,
    dt.timedelta: lambda v: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    dt.timezone: lambda v: {"$timezone": _encode_timezone(v)},
    type(pathlib.Path()): lambda v: {"$path": str(v)},
    pathlib.PurePosixPath: lambda v: {"$pure_posix_path": str(v)},
    pathlib.PureWindowsPath: lambda v: {"$pure_windows_path": str(v)},
    torch.dtype: lambda v: {"$dtype": str(v).removeprefix("torch.")},
    torch.device: lambda v: {"$device": str(v)},
    torch.Size: lambda v: {"$size": list(v)},
}


def _encode_items(flattener: _Flattener, value: Mapping[Any, Any], path: tuple[Any, ...]) -> list[list[Any]]:
    items = []
    for key, item in value.items():
        encoded_key = flattener.encode_hashable(key, (*path, "<key>"), "a key of this dict")
        items.append([encoded_key, flattener.encode(item, (*path, key))])
    return items


def _encode_dict(flattener: _Flattener, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        encode = flattener.encode
        return {key: encode(item, (*path, key)) for key, item in value.items()}
    return {"$dict": _encode_items(flattener, value, path)}


def _encode_ordered(
    flattener: _Flattener, value: collections.OrderedDict[Any, Any], path: tuple[Any, ...]
) -> Any:
    encoded: dict[str, Any] = {"$ordered": _encode_items(flattener, value, path)}
    metadata = getattr(value, "_metadata", None)  # modules keep their version numbers here
    if metadata is not None:
        encoded["metadata"] = flattener.encode(metadata, (*path, "_metadata"))
    return encoded


def _encode_default(
    flattener: _Flattener, value: collections.defaultdict[Any, Any], path: tuple[Any, ...]
) -> Any:
    factory = value.default_factory
    name = next((name for name, known in FACTORIES.items() if known is factory), None)
    if factory is not None and name is None:
        raise UnsupportedTypeError(
            f"cannot save {_place(path)}: a defaultdict with the factory {_short(factory)}; "
            f"only {', '.join(FACTORIES)} and None can be written down. Save dict(value) instead"
        )
    return {"$defaultdict": _encode_items(flattener, value, path), "factory": name}


def _encode_set(flattener: _Flattener, value: Any, path: tuple[Any, ...]) -> list[Any]:
    encoded = [flattener.encode_hashable(item, (*path, "<item>"), "an item of this set") for item in value]
    return sorted(encoded, key=repr)  # the order of a set is nobody's business, and differs between processes


def _encode_list(flattener: _Flattener, value: Any, path: tuple[Any, ...]) -> list[Any]:
    return [flattener.encode(item, (*path, index)) for index, item in enumerate(value)]


_CONTAINERS: dict[type, _ContainerEncoder] = {
    dict: _encode_dict,
    list: _encode_list,
    tuple: lambda f, v, p: {"$tuple": _encode_list(f, v, p)},
    set: lambda f, v, p: {"$set": _encode_set(f, v, p)},
    frozenset: lambda f, v, p: {"$frozenset": _encode_set(f, v, p)},
    collections.OrderedDict: _encode_ordered,
    collections.defaultdict: _encode_default,
    collections.Counter: lambda f, v, p: {"$counter": _encode_items(f, v, p)},
    collections.deque: lambda f, v, p: {"$deque": _encode_list(f, v, p), "maxlen": v.maxlen},
}
