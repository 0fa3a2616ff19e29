"""Ranks: which one this is, and what they do together."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch

from keepstep.train.facade.base import Facade
from keepstep.train.ranks.control import ProcessControl
from keepstep.train.ranks.operations import gather_objects, pad_across_ranks, reduce_over_ranks
from keepstep.train.ranks.process import DistributedType
from keepstep.train.ranks.tensors import slice_tensors
from keepstep.world import Reduction
from keepstep.world.nested import leaves_of

__all__ = ["Communication"]

T = TypeVar("T")

_log = logging.getLogger("keepstep")


class Communication(ProcessControl, Facade):
    """What ranks do together. Each method of these is called by all ranks, in the same order.

    If ranks call different ones, or with tensors that don't match, all of them raise CollectiveMismatchError,
    which names ranks, shapes and lines of the script. If a rank does not come within the time-out, or its
    process ends, the others raise RankMissingError; if it fails on the way, RankFailedError.
    """

    def gather(self, tensor: T) -> T:
        """Concatenate the tensors of all ranks along dimension 0, in the order of ranks, on every rank.

        Args:
            tensor: a tensor, or lists, tuples, named tuples and dicts of tensors, of the same shapes and
                dtypes on every rank (see `pad_across_processes`).

        Returns:
            The same nesting, with N times as many rows for N ranks; N rows for tensors without dimensions.
            With one process, `tensor` itself.

        Raises:
            NotTensorError: something else than a tensor is among them; the message names its place.
        """
        return self._world.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather what an evaluation computed, without samples that only fill up a loader's last batch.

        Args:
            input_data: as for `gather`, with a row for each sample. If something in it is no tensor, a list
                with an item for each sample, as for `keepstep.utils.gather_object`.
            use_gather_object: gather as objects also if all are tensors, of different shapes, say.

        Returns:
            As `gather` or `gather_object`; at the last batch of the prepared loader that is being iterated
            (the one begun last, where several are), real samples only.
        """
        are_tensors = all(isinstance(leaf, torch.Tensor) for _, leaf in leaves_of(input_data))
        as_objects = use_gather_object or not are_tensors
        data = gather_objects(self._world, input_data) if as_objects else self._world.gather(input_data)
        if self._world.size == 1 or not self.gradient_state.end_of_dataloader:
            return data
        real = self.gradient_state.remainder
        if real < 0:
            _log.info(
                "gather_for_metrics: how many samples of the last batch are real is not known, since the "
                "data has no length; all were returned"
            )
        if real <= 0:
            return data
        return data[:real] if as_objects else slice_tensors(data, slice(real))

    def reduce(self, tensor: T, reduction: Reduction = "sum", scale: float = 1.0) -> T:
        """Combine the tensors of all ranks elementwise, on every rank.

        Args:
            tensor: a tensor, or a nesting of tensors, of the same shapes and dtypes on every rank.
            reduction: "sum", "mean", "max" or "none".
            scale: 1.0; others are for devices that keepstep does not run on.

        Returns:
            The same nesting of new tensors. Means of integers are floating-point numbers.

        Raises:
            NotTensorError: something else than a tensor is among them; the message names its place.
            UsageError: an unknown reduction, or a scale.
        """
        return reduce_over_ranks(self._world, tensor, reduction, scale)

    def pad_across_processes(
        self, tensor: T, dim: int = 0, pad_index: float = 0, pad_first: bool = False
    ) -> T:
        """Pad tensors that differ in size between ranks to the largest size, so that they can be gathered.

        Args:
            tensor: a tensor, or a nesting of tensors; those without dimension `dim` stay.
            dim: the dimension that differs.
            pad_index: the value to pad with.
            pad_first: pad at the beginning.
        """
        return pad_across_ranks(self._world, tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def set_trigger(self) -> None:
        """Raise a flag on this rank, which `check_trigger` sees on all of them."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether a rank has called `set_trigger` since the last check that saw one; lowers the flag."""
        triggered = not self._world.agree(not self._triggered, "check_trigger")
        if triggered:
            self._triggered = False
        return triggered

    @property
    def multi_device(self) -> bool:
        """Whether there is more than one process."""
        return self._world.size > 1

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded over the ranks."""
        return self.state.is_fsdp2

    @property
    def distributed_type(self) -> DistributedType:
        """How ranks work together."""
        return self.state.distributed_type
