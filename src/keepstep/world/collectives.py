"""Trees of tensors over the ranks.

Little data travels within the roll call itself. More of it on the CPU goes over the roll call's group, on
other devices over the default group (NCCL).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from keepstep.dense import flat_bytes
from keepstep.errors import UsageError
from keepstep.world.nested import checked_reduction, described, place_of, replaced, tensors_of
from keepstep.world.one import OneRank
from keepstep.world.protocol import Reduction
from keepstep.world.roll_call import RollCall

__all__ = ["Collectives"]

T = TypeVar("T")

_PACKED_BYTES = 64 << 10
"""Up to this much travels packed into one message."""
_GLOO_SUMS = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
}


class Collectives:
    """Gather, reduce and broadcast.

    Args:
        roll_call: where ranks say what they are about to do.
        timeout_s: how long they wait for each other, seconds.
    """

    def __init__(self, roll_call: RollCall, timeout_s: float) -> None:
        self._roll_call = roll_call
        self._size = roll_call.size
        self._timeout_s = timeout_s

    def gather(self, tree: T) -> T:
        rows: list[torch.Tensor] = []
        packed = False

        def prepare() -> tuple[str, bytes]:
            nonlocal packed
            leaves = tensors_of(tree, "gather")
            rows.extend(_dense(t.reshape(1) if t.dim() == 0 else t) for _, t in leaves)
            packed = _fits(rows)
            return described(leaves), b"".join(map(_to_bytes, rows)) if packed else b""

        payloads = self._roll_call.turn("gather", prepare, self._timeout_s)
        if packed:
            parts = list(zip(*(_from_bytes(data, rows) for data in payloads), strict=True))
            gathered = [torch.cat(part) for part in parts]
        else:
            gathered = [self._gathered(tensor) for tensor in rows]
        whole: T = replaced(tree, iter(gathered))
        return whole

    def reduce(self, tree: T, how: Reduction) -> T:
        if how == "none":
            return OneRank().reduce(tree, how)
        totals: list[torch.Tensor] = []
        packed = False

        def prepare() -> tuple[str, bytes]:
            nonlocal packed
            checked_reduction(how)
            leaves = tensors_of(tree, "reduce")
            for path, tensor in leaves:
                if tensor.dtype == torch.bool:
                    raise UsageError(
                        f"reduce: {place_of(path)} is a tensor of bool, which has no {how}: convert it, as "
                        "tensor.int()"
                    )
            totals.extend(
                tensor.detach().clone(memory_format=torch.contiguous_format) for _, tensor in leaves
            )
            packed = _fits(totals) or _needs_packing(totals)
            return f"reduction={how}\n{described(leaves)}", b"".join(
                map(_to_bytes, totals)
            ) if packed else b""

        payloads = self._roll_call.turn("reduce", prepare, self._timeout_s)
        if packed:
            by_rank = [_from_bytes(data, totals) for data in payloads]
            totals = [_combined(parts, how) for parts in zip(*by_rank, strict=True)]
        else:
            for total in totals:
                self._all_reduce(total, how)
        if how == "mean":
            totals = [total / self._size for total in totals]
        whole: T = replaced(tree, iter(totals))
        return whole

    def broadcast(self, tree: T, source: int) -> T:
        tensors: list[torch.Tensor] = []
        packed = False

        def prepare() -> tuple[str, bytes]:
            nonlocal packed
            if not 0 <= source < self._size:
                raise UsageError(f"from_process is {source!r}; allowed: 0 to {self._size - 1}")
            leaves = tensors_of(tree, "broadcast")
            tensors.extend(tensor.detach() for _, tensor in leaves)
            packed = _fits(tensors)
            mine = packed and self._roll_call.rank == source
            signature = f"from_process={source}\n{described(leaves)}"
            return signature, b"".join(_to_bytes(_dense(t)) for t in tensors) if mine else b""

        payloads = self._roll_call.turn("broadcast", prepare, self._timeout_s)
        if packed:
            if self._roll_call.rank != source:
                for tensor, value in zip(tensors, _from_bytes(payloads[source], tensors), strict=True):
                    tensor.copy_(value)
        else:
            for tensor in tensors:
                self._broadcast(tensor, source)
        return tree

    # ------------------------------------------------------------------------------------ one tensor

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """As bytes, which every backend takes."""
        whole = rows.new_empty((self._size * rows.shape[0], *rows.shape[1:]))
        if not rows.numel():
            return whole
        sent = flat_bytes(rows)
        received = list(flat_bytes(whole).view(self._size, -1))

        if rows.device.type == "cpu":
            options = distributed_c10d.AllgatherOptions()  # type: ignore[attr-defined]
            self._run("gather", options, lambda group: group.allgather([received], [sent], options))
        else:
            dist.all_gather(received, sent)
        return whole

    def _run(self, what: str, options: Any, start: Callable[[Any], Any]) -> None:
        """Do something over the roll call's group."""

        def begin(group: Any, timeout: dt.timedelta) -> Any:
            options.timeout = timeout
            return start(group)

        self._roll_call.run(what, begin, self._timeout_s)

    def _all_reduce(self, total: torch.Tensor, how: Reduction) -> None:
        operation = dist.ReduceOp(dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
        if total.device.type == "cpu":
            options = distributed_c10d.AllreduceOptions()
            options.reduceOp = operation
            self._run("reduce", options, lambda group: group.allreduce([total], options))
        else:
            dist.all_reduce(total, operation)

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        dense = _dense(tensor)
        if not dense.numel():
            return
        sent = flat_bytes(dense)
        if tensor.device.type == "cpu":
            options = distributed_c10d.BroadcastOptions()
            options.rootRank = source
            self._run("broadcast", options, lambda group: group.broadcast([sent], options))
        else:
            dist.broadcast(sent, source)
        if dense is not tensor and self._roll_call.rank != source:
            tensor.copy_(dense)


# ----------------------------------------------------------------------------------------- packing


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().resolve_conj().resolve_neg()


def _fits(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all of them together are small enough to be packed; the same on ranks with equal shapes."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return on_cpu and sum(tensor.nbytes for tensor in tensors) <= _PACKED_BYTES


def _needs_packing(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether they are of dtypes that gloo can't add up."""
    return any(tensor.device.type == "cpu" and tensor.dtype not in _GLOO_SUMS for tensor in tensors)


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return flat_bytes(tensor.cpu()).numpy().tobytes() if tensor.numel() else b""


def _from_bytes(data: bytes, shaped_as: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    tensors, begin = [], 0
    for model in shaped_as:
        end = begin + model.nbytes
        if model.numel():
            flat = torch.frombuffer(bytearray(data[begin:end]), dtype=model.dtype)
            tensors.append(flat.reshape(model.shape).to(model.device))
        else:
            tensors.append(torch.empty_like(model))
        begin = end
    return tensors


def _combined(parts: Sequence[torch.Tensor], how: Reduction) -> torch.Tensor:
    """In the order of ranks, so that every rank gets the same bits."""
    total = parts[0]
    for part in parts[1:]:
        total = torch.maximum(total, part) if how == "max" else total + part
    return total
