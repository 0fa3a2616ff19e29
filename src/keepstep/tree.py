"""Nested state <-> typed JSON plus a flat table of tensors. Never pickle.

`flatten` turns a state (nested dict, list, tuple of tensors, arrays and plain values, or live objects
with `state_dict`/`load_state_dict`) into

* a *tree*: JSON in which every non-tensor value is written out exactly and a tensor is a reference,
* *leaves*: the tensors, each with an address that is unique in the state ("model/h.0.weight").

`unflatten` is its inverse. Plain JSON types stand for themselves; everything else is an object with one
key that begins with "$". docs/format.md lists them all.
"""

from __future__ import annotations

import base64
import collections
import datetime as dt
import fnmatch
import math
import pathlib
import struct
import zoneinfo
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from keepstep.errors import (
    KeepstepError,
    StateStructureError,
    TensorNotSavableError,
    UnsupportedTypeError,
    UsageError,
)

__all__ = [
    "DTYPES",
    "Flat",
    "Leaf",
    "Stateful",
    "address_of",
    "elements_of",
    "flatten",
    "inside_object",
    "is_stateful",
    "items_of",
    "register_codec",
    "select",
    "tensors_in",
    "unflatten",
]

MAX_DEPTH = 200
_EXACT_JSON_INTEGER = 2**53


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One tensor of a state.

    Attributes:
        address: unique in the state: group, "/", name.
        group: the root key it lies under; a group becomes a file.
        name: its path below the group, joined by dots: the exact name that a module's state dict has.
        tensor: the live tensor, detached; shares memory with what was given.
    """

    address: str
    group: str
    name: str
    tensor: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Flat:
    """A flattened state."""

    tree: Any
    leaves: list[Leaf]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Codec:
    type: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_codecs_by_type: dict[type, _Codec] = {}
_codecs_by_name: dict[str, _Codec] = {}


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
    taken = _codecs_by_name.get(name)
    if taken is not None and taken.type is not type:
        raise UsageError(
            f"codec name {name!r} is taken by {_type_name(taken.type)}; choose another name for {_type_name(type)}"
        )
    codec = _Codec(type=type, name=name, encode=encode, decode=decode)
    _codecs_by_type[type] = codec
    _codecs_by_name[name] = codec


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def address_of(path: tuple[Any, ...]) -> str:
    """How a place in a state is written in messages: "optimizer/state.0.exp_avg"."""
    return (
        "/".join((str(path[0]), ".".join(map(str, path[1:])))) if len(path) > 1 else "".join(map(str, path))
    )


# --------------------------------------------------------------------------------------- flatten


def flatten(state: Any) -> Flat:
    """Split a state into typed JSON and tensors.

    Live objects are asked for their `state_dict()`; tensors are referenced, not copied.

    Raises:
        UnsupportedTypeError: a leaf of a type that is not stored, with its place and the ways out.
        StateStructureError: the state contains itself or is nested deeper than 200 levels.
        TensorNotSavableError: a tensor without plain bytes (meta, sparse, quantized, subclass).
    """
    flattener = _Flattener()
    tree = flattener.encode(state, ())
    return Flat(tree=tree, leaves=flattener.leaves)


@dataclass(slots=True)
class _Flattener:
    leaves: list[Leaf] = field(default_factory=list)
    addresses: set[str] = field(default_factory=set)
    open_containers: set[int] = field(default_factory=set)

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        encoder = _SCALARS.get(kind)
        if encoder is not None:
            return encoder(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return {"$tensor": self.add_tensor(value, path)}
        if kind in _codecs_by_type:
            codec = _codecs_by_type[kind]
            return {"$codec": codec.name, "value": self.inside(value, path, lambda: codec.encode(value))}
        container = _CONTAINERS.get(kind)
        if container is not None:
            return self.nested(value, path, container)
        if isinstance(value, np.ndarray | np.generic):
            return self.encode_numpy(value, path)
        if isinstance(value, np.dtype):
            return {"$numpy_dtype": value.str}
        if isinstance(value, torch.Tensor):
            raise TensorNotSavableError(_SUBCLASS.format(place=_place(path), type=_type_name(kind)))
        if is_stateful(value):
            return {"$object": _type_name(kind), "state": self.inside(value, path, value.state_dict)}
        raise UnsupportedTypeError(
            _UNSUPPORTED.format(place=_place(path), type=_type_name(kind), value=_short(value))
        )

    def inside(self, owner: Any, path: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        return self.nested(owner, path, lambda flattener, _, below: flattener.encode(make(), below))

    def nested(self, value: Any, path: tuple[Any, ...], encode: _ContainerEncoder) -> Any:
        if id(value) in self.open_containers:
            raise StateStructureError(
                f"the state contains itself at {_place(path)} (a {_type_name(type(value))}); "
                "a state must be a tree: break the cycle before saving"
            )
        if len(self.open_containers) >= MAX_DEPTH:
            raise StateStructureError(
                f"the state is nested deeper than {MAX_DEPTH} levels at {_place(path[:4])}...; flatten it before saving"
            )
        self.open_containers.add(id(value))
        try:
            return encode(self, value, path)
        finally:
            self.open_containers.discard(id(value))

    def add_tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> str:
        _refuse_unsavable(tensor, path)
        group, name = (str(path[0]), ".".join(map(str, path[1:])) or "value") if path else ("state", "value")
        address, n = f"{group}/{name}", 1
        while address in self.addresses:  # {0: x, "0": y} and {"a.b": x, "a": {"b": y}} read alike
            n += 1
            address = f"{group}/{name}~{n}"
        self.addresses.add(address)
        self.leaves.append(
            Leaf(
                address=address,
                group=group,
                name=address[len(group) + 1 :],
                tensor=tensor.detach(),
            )
        )
        return address

    def encode_numpy(self, value: np.ndarray[Any, Any] | np.generic, path: tuple[Any, ...]) -> Any:
        dtype = value.dtype
        plain = type(value) in {np.ndarray, np.memmap, dtype.type} and dtype.names is None
        if not plain or dtype.hasobject or not dtype.itemsize:
            kind = f"{_type_name(type(value))} of dtype {dtype}"
            raise UnsupportedTypeError(
                _UNSUPPORTED.format(place=_place(path), type=kind, value=_short(value))
            )
        if isinstance(value, np.generic):
            return {"$numpy_scalar": base64.b64encode(value.tobytes()).decode(), "dtype": dtype.str}
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        tensor = torch.from_numpy(data if data.flags.writeable else data.copy())
        native = _torch_dtype_of_numpy(dtype)
        if native is not None:
            tensor = tensor.view(native).reshape(value.shape)
        return {"$ndarray": self.add_tensor(tensor, path), "dtype": dtype.str, "shape": list(value.shape)}


_ContainerEncoder = Callable[["_Flattener", Any, tuple[Any, ...]], Any]


def _place(path: tuple[Any, ...]) -> str:
    return repr(address_of(path)) if path else "the root of the state"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= 80 else text[:77] + "..."


_UNSUPPORTED = (
    "cannot save {place}: it is a {type}, {value}. keepstep stores tensors, NumPy arrays, plain Python values and "
    "objects with state_dict/load_state_dict, and never pickles. Give the class those two methods, or register a "
    "codec for it with keepstep.register_codec, or leave it out of the state"
)
_SUBCLASS = (
    "cannot save {place}: a {type} may hold more than plain bytes. Save tensor.as_subclass(torch.Tensor), or register "
    "a codec for the class with keepstep.register_codec"
)


def _refuse_unsavable(tensor: torch.Tensor, path: tuple[Any, ...]) -> None:
    if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized:
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
        return zone.utcoffset(None).total_seconds()
    raise UnsupportedTypeError(
        f"cannot save a datetime whose time zone is a {_type_name(type(zone))}; use datetime.timezone or zoneinfo.ZoneInfo"
    )


def _encode_datetime(value: dt.datetime) -> Any:
    naive = value.replace(tzinfo=None, fold=0).isoformat()
    return {"$datetime": naive, "zone": _encode_timezone(value.tzinfo), "fold": value.fold}


def _encode_time(value: dt.time) -> Any:
    naive = value.replace(tzinfo=None, fold=0).isoformat()
    return {"$time": naive, "zone": _encode_timezone(value.tzinfo), "fold": value.fold}


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
        known = len(flattener.leaves)
        encoded_key = flattener.encode(key, (*path, "<key>"))
        if len(flattener.leaves) != known:
            raise UnsupportedTypeError(
                f"cannot save {_place(path)}: a key of this dict holds a tensor; use a str, int or tuple as the key"
            )
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
    name = next((name for name, known in _FACTORIES.items() if known is factory), None)
    if factory is not None and name is None:
        raise UnsupportedTypeError(
            f"cannot save {_place(path)}: a defaultdict with the factory {_short(factory)}; "
            f"only {', '.join(_FACTORIES)} and None can be written down. Save dict(value) instead"
        )
    return {"$defaultdict": _encode_items(flattener, value, path), "factory": name}


def _encode_set(flattener: _Flattener, value: Any, path: tuple[Any, ...]) -> list[Any]:
    encoded = [flattener.encode(item, (*path, "<item>")) for item in value]
    return sorted(encoded, key=repr)  # the order of a set is nobody's business, and differs between processes


def _encode_list(flattener: _Flattener, value: Any, path: tuple[Any, ...]) -> list[Any]:
    return [flattener.encode(item, (*path, index)) for index, item in enumerate(value)]


_FACTORIES: dict[str, Callable[[], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "set": set,
}
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


# ---------------------------------------------------------------------------------- looking inside


def inside_object(node: Any) -> Any:
    """The encoded state of a live object; any other node is returned as it is."""
    return node["state"] if type(node) is dict and "$object" in node else node


def items_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Decoded keys and encoded values of an encoded mapping; None if the node is none.

    Raises:
        ValueError: for a mapping that `flatten` cannot have made.
    """
    if type(node) is not dict:
        return None
    first = next(iter(node), "")
    if not first.startswith("$"):
        return list(node.items())
    if first not in _MAPPINGS:
        return None
    return [(unflatten(key, _no_tensor), item) for key, item in node[first]]


def elements_of(node: Any) -> tuple[list[Any], bool] | None:
    """Encoded elements of an encoded list (or tuple: then True); None if the node is neither."""
    if type(node) is list:
        return node, False
    if type(node) is dict and type(node.get("$tuple")) is list:
        return node["$tuple"], True
    return None


def tensors_in(node: Any) -> Iterator[str]:
    """Addresses of all tensors and arrays in an encoded tree."""
    if type(node) is dict:
        for key, item in node.items():
            if key in ("$tensor", "$ndarray"):
                yield item
            else:
                yield from tensors_in(item)
    elif type(node) is list:
        for item in node:
            yield from tensors_in(item)


def select(tree: Any, patterns: Sequence[str]) -> Any:
    """Only those parts of an encoded tree whose address matches.

    A pattern is an address ("model", "model/h.0.ln.weight", "optimizer/state.0") or a shell glob over
    addresses ("model/h.0.*"). Mappings lose what doesn't match; a list or tuple in which something
    matches stays whole, so that no index shifts.

    Raises:
        UsageError: nothing matches.
    """
    chosen, found = _select(tree, (), patterns)
    if not found:
        names = [str(key) for key, _ in items_of(inside_object(tree)) or ()]
        raise UsageError(
            f"only={list(patterns)!r} matches nothing in this checkpoint; its root holds: {', '.join(names) or 'no names'}"
        )
    return chosen


def _select(node: Any, path: tuple[Any, ...], patterns: Sequence[str]) -> tuple[Any, bool]:
    address = address_of(path)
    if path and any(address == pattern or fnmatch.fnmatchcase(address, pattern) for pattern in patterns):
        return node, True
    if type(node) is dict and "$object" in node:
        state, found = _select(node["state"], path, patterns)
        return {**node, "state": state}, found
    items = items_of(node)
    if items is None:
        elements = elements_of(node)
        found = elements is not None and any(
            _select(item, (*path, index), patterns)[1] for index, item in enumerate(elements[0])
        )
        return node, found
    results = [_select(item, (*path, key), patterns) for key, item in items]
    first = next(iter(node), "")
    if first in _MAPPINGS:
        pairs = zip(node[first], results, strict=True)
        chosen: Any = {**node, first: [[key, item] for (key, _), (item, found) in pairs if found]}
    else:
        chosen = {key: item for (key, _), (item, found) in zip(items, results, strict=True) if found}
    return chosen, any(found for _, found in results)


_MAPPINGS = ("$dict", "$ordered", "$defaultdict", "$counter")


def _no_tensor(address: str) -> torch.Tensor:
    raise ValueError(f"a key refers to the tensor {address!r}")


# ------------------------------------------------------------------------------------- unflatten


def unflatten(tree: Any, tensor_at: Callable[[str], torch.Tensor]) -> Any:
    """Rebuild a state from its tree.

    Args:
        tree: what `flatten` made, possibly read from disk: it is checked, never trusted.
        tensor_at: address -> tensor.

    Raises:
        ValueError: for a tree that `flatten` cannot have made.
        UnsupportedTypeError: a value's codec is not registered.
    """
    try:
        return _Unflattener(tensor_at).decode(tree)
    except KeepstepError:
        raise
    except RecursionError:
        raise ValueError(f"the tree is nested deeper than {MAX_DEPTH} levels") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"the tree holds a value that keepstep never writes: {error!r}") from error


@dataclass(frozen=True, slots=True)
class _Unflattener:
    tensor_at: Callable[[str], torch.Tensor]

    def decode(self, node: Any) -> Any:
        kind = type(node)
        if kind is dict:
            first = next(iter(node), "")
            if not first.startswith("$"):
                return {key: self.decode(item) for key, item in node.items()}
            decoder = _DECODERS.get(first)
            if decoder is None:
                raise ValueError(f"unknown kind {first!r}")
            return decoder(self, node)
        if kind is list:
            return [self.decode(item) for item in node]
        return node

    def items(self, pairs: Any) -> Iterator[tuple[Any, Any]]:
        for key, item in pairs:
            yield self.decode(key), self.decode(item)


def _decode_float(node: Any) -> float:
    if type(node) is dict:
        text = node["$float"]
        return float(text) if text in {"inf", "-inf"} else float(struct.unpack(">d", bytes.fromhex(text))[0])
    return float(node)


def _decode_zone(node: Any) -> dt.tzinfo | None:
    if node is None:
        return None
    return zoneinfo.ZoneInfo(node) if isinstance(node, str) else dt.timezone(dt.timedelta(seconds=node))


def _decode_ordered(u: _Unflattener, node: dict[str, Any]) -> Any:
    value = collections.OrderedDict(u.items(node["$ordered"]))
    if "metadata" in node:
        value._metadata = u.decode(node["metadata"])  # type: ignore[attr-defined]
    return value


def _decode_default(u: _Unflattener, node: dict[str, Any]) -> Any:
    factory = None if node["factory"] is None else _FACTORIES[node["factory"]]
    return collections.defaultdict(factory, u.items(node["$defaultdict"]))


def _decode_ndarray(u: _Unflattener, node: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = _numpy_dtype(node["dtype"])
    tensor = u.tensor_at(node["$ndarray"])
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return data.view(dtype).reshape(node["shape"])


def _decode_numpy_scalar(node: dict[str, Any]) -> Any:
    return np.frombuffer(base64.b64decode(node["$numpy_scalar"]), dtype=_numpy_dtype(node["dtype"]))[0]


def _numpy_dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"NumPy dtype {text!r} is never written")
    return dtype


def _decode_codec(u: _Unflattener, node: dict[str, Any]) -> Any:
    codec = _codecs_by_name.get(node["$codec"])
    if codec is None:
        raise UnsupportedTypeError(
            f"this checkpoint holds a value written by the codec {node['$codec']!r}, which is not registered; "
            f"call keepstep.register_codec before loading (registered: {', '.join(sorted(_codecs_by_name)) or 'none'})"
        )
    return codec.decode(u.decode(node["value"]))


def _decode_datetime(node: dict[str, Any]) -> dt.datetime:
    return dt.datetime.fromisoformat(node["$datetime"]).replace(
        tzinfo=_decode_zone(node["zone"]), fold=node["fold"]
    )


def _decode_time(node: dict[str, Any]) -> dt.time:
    return dt.time.fromisoformat(node["$time"]).replace(tzinfo=_decode_zone(node["zone"]), fold=node["fold"])


_DECODERS: dict[str, Callable[[_Unflattener, dict[str, Any]], Any]] = {
    "$tensor": lambda u, n: u.tensor_at(n["$tensor"]),
    "$ndarray": _decode_ndarray,
    "$numpy_scalar": lambda _, n: _decode_numpy_scalar(n),
    "$numpy_dtype": lambda _, n: _numpy_dtype(n["$numpy_dtype"]),
    "$object": lambda u, n: u.decode(n["state"]),
    "$codec": _decode_codec,
    "$int": lambda _, n: int(n["$int"], 16),
    "$float": lambda _, n: _decode_float(n),
    "$complex": lambda _, n: complex(*map(_decode_float, n["$complex"])),
    "$bytes": lambda _, n: base64.b64decode(n["$bytes"], validate=True),
    "$bytearray": lambda _, n: bytearray(base64.b64decode(n["$bytearray"], validate=True)),
    "$datetime": lambda _, n: _decode_datetime(n),
    "$date": lambda _, n: dt.date.fromisoformat(n["$date"]),
    "$time": lambda _, n: _decode_time(n),
    "$timedelta": lambda _, n: dt.timedelta(*n["$timedelta"]),
    "$timezone": lambda _, n: _decode_zone(n["$timezone"]),
    "$path": lambda _, n: pathlib.Path(n["$path"]),
    "$pure_posix_path": lambda _, n: pathlib.PurePosixPath(n["$pure_posix_path"]),
    "$pure_windows_path": lambda _, n: pathlib.PureWindowsPath(n["$pure_windows_path"]),
    "$dtype": lambda _, n: DTYPES[n["$dtype"]],
    "$device": lambda _, n: torch.device(n["$device"]),
    "$size": lambda _, n: torch.Size(n["$size"]),
    "$dict": lambda u, n: dict(u.items(n["$dict"])),
    "$ordered": _decode_ordered,
    "$defaultdict": _decode_default,
    "$counter": lambda u, n: collections.Counter(dict(u.items(n["$counter"]))),
    "$tuple": lambda u, n: tuple(u.decode(n["$tuple"])),
    "$set": lambda u, n: set(u.decode(n["$set"])),
    "$frozenset": lambda u, n: frozenset(u.decode(n["$frozenset"])),
    "$deque": lambda u, n: collections.deque(u.decode(n["$deque"]), n["maxlen"]),
}
