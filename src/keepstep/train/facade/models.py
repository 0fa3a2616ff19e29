"""Models out of a run: weights as files that others load, and any value as a file."""

from __future__ import annotations

import io
import os
from typing import Any

import torch

from keepstep.models.export import check_export, export_weights
from keepstep.models.objects import save_object
from keepstep.models.states import full_state, is_sharded
from keepstep.train.facade.base import Facade

__all__ = ["Models"]

_EXPORT_TIMEOUT_S = 6 * 3600.0
"""How long ranks wait while the main process writes a model; a rank that fails says so at once."""


class Models(Facade):
    """What a run gives to others."""

    @property
    def should_save_model(self) -> bool:
        """Whether this process writes a model that all hold: the first one on its machine."""
        return self._world.local_rank == 0

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole state dict of a prepared model. With sharded models every rank has to call this.

        Args:
            model: prepared or not; it may be offloaded.
            unwrap: names as the script's own module has them; False leaves those of wrappers.

        Returns:
            Values by name. Of a sharded model they are gathered on the CPU of rank 0, and the other ranks get
            an empty dict.

        Raises:
            TensorNotSavableError: a tensor is on the meta device and is offloaded nowhere.
        """
        inner = self._preparer.unwrap_model(model, keep_precision=True) if unwrap else model
        return full_state(inner, keep=not is_sharded(inner) or self._world.rank == 0)

    def save_model(
        self,
        model: torch.nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights as safetensors files that others load; durable on return, on every rank.

        An earlier export in the directory is replaced: whoever is killed leaves the old one or the new one.
        Every rank has to call this; the main process writes.

        Args:
            model: prepared or not; it may be sharded or offloaded.
            save_directory: made if it is not there; files of others in it stay.
            max_shard_size: bytes, or a text as "1GB"; a larger tensor gets a file of its own.
            safe_serialization: only True: the other format is pickle.

        Raises:
            BackgroundSaveError: a checkpoint could not be saved, and the policy says `on_error="raise"`. The
                weights are saved all the same.
            UsageError: the size is none, or pickle was asked for.
            DirectoryNotOursError: the directory is a file, or a checkpoint.
            TensorNotSavableError: a tensor has no values.
            StoreError: the disk refuses; what was there is whole.
            RankFailedError: the main process could not write.
        """
        check_export(save_directory, max_shard_size, safe_serialization)
        problem = self._saver.settle()
        inner = self._preparer.unwrap_model(model, keep_precision=True)
        with self._world.meeting("export", _EXPORT_TIMEOUT_S) as meeting:
            state = full_state(inner, keep=self._world.rank == 0)
            if self._world.rank == 0:
                export_weights(state, save_directory, max_shard_size=max_shard_size)
            meeting.exchange(b"")
        if problem is not None:
            raise problem

    def save(self, obj: Any, f: str | os.PathLike[str] | io.IOBase, safe_serialization: bool = False) -> None:
        """Write a value to a file, atomically and durably, on the main process; `keepstep.load` reads it.

        A state dict becomes a safetensors file that every tool reads, any other tree of tensors and plain
        values a safetensors file with the tree in its metadata. Nothing is pickled.

        Args:
            obj: a state dict, or anything that a checkpoint may hold.
            f: a path, or a file opened for writing bytes.
            safe_serialization: True insists on a state dict of tensors alone.

        Raises:
            UnsupportedTypeError: a leaf of a type that is not stored, with its place.
            UsageError: `safe_serialization` with something else than a state dict.
            StoreError: the disk refuses; what was there is whole.
        """
        each_node = self.project_configuration.save_on_each_node
        if (self._world.local_rank if each_node else self._world.rank) == 0:
            save_object(obj, f, safe_serialization)
