"""Data that one rank hands out to the others, over a gloo group of its own."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from keepstep.errors import RankMissingError
from keepstep.world.protocol import Parcel

__all__ = ["Mail"]

_MOST_MAIL_S = 1e6


class Mail:
    """Hands out parcels; see `World.scatter`. All ranks make it together.

    Args:
        rank: this process.
        timeout_s: how long it waits for a parcel, seconds.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._group: Any = dist.new_group(
            backend="gloo", timeout=dt.timedelta(seconds=min(timeout_s, _MOST_MAIL_S))
        )

    def scatter(self, parcels: Sequence[Parcel | None] | None, source: int) -> Parcel | None:
        """Hand out, or receive where `parcels` is None; None for a sender that has none for itself.

        Raises:
            RankMissingError: `source`, or a rank it had a parcel for, was gone or did not come.
        """
        return self._received(source) if parcels is None else self._sent(parcels)

    @contextlib.contextmanager
    def _with(self, other: int) -> Iterator[None]:
        """Name the other rank if it is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RankMissingError(
                f"handing out data broke off between rank {self._rank} and rank {other}: rank {other} has "
                f"ended, or did not come within {self._timeout_s:g} s: {error}",
                ranks=[other],
                waited_s=self._timeout_s,
            ) from error

    def _sent(self, parcels: Sequence[Parcel | None]) -> Parcel | None:
        under_way: list[Any] = []
        for rank, parcel in enumerate(parcels):
            if parcel is None or rank == self._rank:
                continue
            words, data = parcel
            body = torch.cat([data, torch.frombuffer(bytearray(words), dtype=torch.uint8)])
            head = torch.tensor([len(words), data.numel()])
            with self._with(rank):
                # What is sent has to stay alive until it was received.
                under_way += [
                    (rank, dist.isend(part, rank, group=self._group), part) for part in (head, body)
                ]
        for rank, work, _ in under_way:
            with self._with(rank):
                work.wait()
        return parcels[self._rank]

    def _received(self, source: int) -> Parcel:
        head = torch.empty(2, dtype=torch.int64)
        with self._with(source):
            dist.recv(head, source, group=self._group)
            words, size = head.tolist()
            body = torch.empty(words + size, dtype=torch.uint8)
            dist.recv(body, source, group=self._group)
        # The data comes first: tensors are views of it, so it has to begin at an aligned address.
        return body[size:].numpy().tobytes(), body[:size]
