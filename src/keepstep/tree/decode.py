"""Typed JSON and tensors -> a state."""

from __future__ import annotations

import base64
import collections
import datetime as dt
import pathlib
import re
import struct
import zoneinfo
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepstep.dense import flat_bytes
from keepstep.errors import KeepstepError, RestoreError, UnsupportedTypeError
from keepstep.tree.leaf import ALL_DTYPES, FACTORIES, MAX_DEPTH, codecs_by_name

__all__ = ["KINDS", "unflatten"]


def unflatten(tree: Any, tensor_at: Callable[[str], torch.Tensor]) -> Any:
    """Rebuild a state from its tree.

    Args:
        tree: what `flatten` made, possibly read from disk: it is checked, never trusted.
        tensor_at: address -> tensor.

    Raises:
        ValueError: for a tree that `flatten` cannot have made.
        UnsupportedTypeError: a value's codec is not registered.
        RestoreError: a codec refused what it once wrote, or this installation can't make a value that
            another one wrote: it lacks the time zone, or its torch the device.
    """
    try:
        return _Unflattener(tensor_at).decode(tree)
    except KeepstepError:
        raise
    except RecursionError:
        raise ValueError(f"the tree is nested deeper than {MAX_DEPTH} levels") from None
    except _REFUSALS as error:
        raise ValueError(f"the tree holds a value that keepstep never writes: {error!r}") from error


_REFUSALS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    OSError,  # a time zone's name that is a directory
    struct.error,
)


@dataclass(frozen=True, slots=True)
class _Unflattener:
    tensor_at: Callable[[str], torch.Tensor]

    def decode(self, node: Any) -> Any:
        kind = type(node)
        if kind is dict:
            first = next(iter(node), "")
            if not first.startswith("$"):
                return {key: self.decode(item) for key, item in node.items()}
            decoder = KINDS.get(first)
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
    if isinstance(node, str):
        try:
            return zoneinfo.ZoneInfo(node)
        except zoneinfo.ZoneInfoNotFoundError as error:
            raise _lacking(f"the time zone {node!r}", "the tzdata package") from error
    seconds, *name = node if isinstance(node, list) else [node]
    return dt.timezone(dt.timedelta(seconds=seconds), *name)


def _decode_ordered(u: _Unflattener, node: dict[str, Any]) -> Any:
    value = collections.OrderedDict(u.items(node["$ordered"]))
    if "metadata" in node:
        value._metadata = u.decode(node["metadata"])  # type: ignore[attr-defined]
    return value


def _decode_default(u: _Unflattener, node: dict[str, Any]) -> Any:
    factory = None if node["factory"] is None else FACTORIES[node["factory"]]
    return collections.defaultdict(factory, u.items(node["$defaultdict"]))


def _decode_ndarray(u: _Unflattener, node: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = _numpy_dtype(node["dtype"])
    tensor = u.tensor_at(node["$ndarray"])
    if not tensor.is_contiguous():  # arrays are written dense; making one dense could take any memory
        raise ValueError("an array refers to a tensor with gaps")
    data = flat_bytes(tensor).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return data.view(dtype).reshape(node["shape"])


def _decode_numpy_scalar(node: dict[str, Any]) -> Any:
    data, dtype = base64.b64decode(node["$numpy_scalar"], validate=True), _numpy_dtype(node["dtype"])
    if dtype.kind == "S":  # an array would cut zeros off the end
        return np.bytes_(data)
    if dtype.kind == "U":
        return np.str_(data.decode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le", "surrogatepass"))
    return np.frombuffer(data, dtype=dtype)[0]


def _numpy_dtype(text: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(text)
    except TypeError as error:
        if isinstance(text, str) and _NUMPY_NUMBER.fullmatch(text):
            raise _lacking(f"the NumPy dtype {text!r}", "a NumPy for a platform that has it") from error
        raise
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"NumPy dtype {text!r} is never written")
    return dtype


def _dtype(name: str) -> torch.dtype:
    dtype = ALL_DTYPES.get(name)
    if dtype is None and isinstance(name, str) and _DTYPE.fullmatch(name):
        raise _lacking(f"torch.{name}", "a torch that has it")
    return dtype if dtype is not None else ALL_DTYPES[name]


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        if isinstance(text, str) and _DEVICE.fullmatch(text):
            raise _lacking(f"the device {text!r}", "a torch, or its extension, that has it") from error
        raise


_DTYPE = re.compile(r"(q?u?int|b?float|complex|bits)[0-9][0-9a-z_]{0,30}")
_NUMPY_NUMBER = re.compile(r"[<>|=]?[biufc][0-9]{1,2}")
_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,30}(:[0-9]{1,4})?")


def _lacking(what: str, install: str) -> RestoreError:
    """Nothing is wrong with the bytes of a checkpoint that needs more than this installation has."""
    return RestoreError(
        f"this checkpoint holds {what}, which this installation doesn't know. The checkpoint is whole: "
        f"install {install}, and load it again"
    )


def _decode_codec(u: _Unflattener, node: dict[str, Any]) -> Any:
    codec = codecs_by_name.get(node["$codec"])
    if codec is None:
        raise UnsupportedTypeError(
            f"this checkpoint holds a value written by the codec {node['$codec']!r}, which is not "
            "registered; call keepstep.register_codec before loading "
            f"(registered: {', '.join(sorted(codecs_by_name)) or 'none'})"
        )
    value = u.decode(node["value"])
    try:
        return codec.decode(value)
    except Exception as error:  # the user's code; it says nothing about the checkpoint's bytes
        raise RestoreError(f"the codec {codec.name!r} can't read what it wrote: {error!r}") from error


def _decode_datetime(node: dict[str, Any]) -> dt.datetime:
    return dt.datetime.fromisoformat(node["$datetime"]).replace(
        tzinfo=_decode_zone(node["zone"]), fold=node["fold"]
    )


def _decode_time(node: dict[str, Any]) -> dt.time:
    return dt.time.fromisoformat(node["$time"]).replace(tzinfo=_decode_zone(node["zone"]), fold=node["fold"])


KINDS: dict[str, Callable[[_Unflattener, dict[str, Any]], Any]] = {
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
    "$dtype": lambda _, n: _dtype(n["$dtype"]),
    "$device": lambda _, n: _device(n["$device"]),
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
"""How each kind of node is read, by its first member; docs/format.md lists them."""
