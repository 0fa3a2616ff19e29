"""What goes over sockets: frames with their length in front; events as JSON, safe to read."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

from keepstep.tune.executors.protocol import Ended, Event, Failed, Reported, Saved, SavedCheckpoint, Started

__all__ = ["Frames", "event_of", "frame", "read_frame", "text_of"]

_LENGTH: Final = struct.Struct("!Q")
_KINDS: Final[dict[str, type]] = {kind.__name__: kind for kind in (Started, Reported, Saved, Ended, Failed)}


def frame(data: bytes) -> bytes:
    """Bytes as they go over a socket."""
    return _LENGTH.pack(len(data)) + data


def read_frame(connection: socket.socket) -> bytes | None:
    """Wait for the next frame; None: the other side is gone."""
    head = _exactly(connection, _LENGTH.size)
    return _exactly(connection, _LENGTH.unpack(head)[0]) if head is not None else None


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    found = bytearray()
    while len(found) < count:
        part = connection.recv(min(count - len(found), 1 << 20))
        if not part:
            return None
        found += part
    return bytes(found)


class Frames:
    """Cuts bytes that come in pieces into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """More bytes came: the frames that are whole now."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                return
            found = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield found


def text_of(event: Event) -> bytes:
    """An event as JSON."""
    return json.dumps([type(event).__name__, dataclasses.asdict(event)]).encode()


def event_of(text: bytes) -> Event:
    """Undo `text_of`.

    Raises:
        ValueError: that is no event.
    """
    kind, told = json.loads(text)
    if kind not in _KINDS:
        raise ValueError(f"no event is called {kind!r:.100}")
    checkpoint: Any = told.get("checkpoint")
    if checkpoint is not None:
        told["checkpoint"] = SavedCheckpoint(**checkpoint)
    try:
        made: Event = _KINDS[kind](**told)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return made
