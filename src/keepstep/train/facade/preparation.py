"""Preparing what a script made, and giving it back."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from keepstep.errors import UsageError
from keepstep.train.facade.base import Facade
from keepstep.train.step import PreparedOptimizer, PreparedScheduler

__all__ = ["Preparation"]


class Preparation(Facade):
    """`prepare` and its relatives."""

    def prepare(self, *objects: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare models, optimizers, DataLoaders and schedulers, in any order and number.

        Args:
            objects: anything of another type comes back as it is.
            device_placement: for each object, whether a model is moved to the device; None for all.

        Returns:
            The prepared object, or a tuple of them in the order given.
        """
        if device_placement is not None and len(device_placement) != len(objects):
            raise UsageError(
                f"prepare() got {len(objects)} objects and device_placement for {len(device_placement)}; "
                "give one value for each object, or leave it out."
            )
        for value, place in zip(objects, device_placement or (), strict=False):
            if isinstance(value, torch.nn.Module) and not place:
                self._preparer.prepare_model(value, on_device=False)
        prepared = self._preparer.prepare(objects)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        """Move a model to the device, make it run in the run's precision, and share it among the ranks.

        Args:
            model: compiled or not.
            device_placement: move it; None for what the Accelerator was given.
            evaluation_mode: it is not trained, so ranks exchange no gradients.
        """
        return self._preparer.prepare_model(
            model, on_device=device_placement is not False, evaluation=evaluation_mode
        )

    def prepare_optimizer(
        self,
        optimizer: Optimizer,
        device_placement: bool | None = None,
    ) -> PreparedOptimizer:
        """Make an optimizer step only when gradients are complete.

        Args:
            optimizer: prepared before, the same comes back.
            device_placement: without effect: an optimizer's state is where its parameters are.
        """
        return self._preparer.prepare_optimizer(optimizer)

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: None = None,
    ) -> DataLoader[Any]:
        """Make a DataLoader's order exact and resumable, and share it out between ranks.

        Args:
            data_loader: prepared before, the same comes back.
            device_placement: move its batches to the device; None for what the Accelerator was given.
            slice_fn_for_dispatch: must be None: batches are shared out by samples.

        Raises:
            UsageError: a function was given.
        """
        if slice_fn_for_dispatch is not None:
            raise UsageError(
                f"slice_fn_for_dispatch is {slice_fn_for_dispatch!r:.100}; keepstep shares batches out by "
                "their samples. Leave it out."
            )
        return self._preparer.prepare_loader(data_loader, on_device=device_placement is not False)

    def prepare_scheduler(self, scheduler: LRScheduler) -> PreparedScheduler:
        """Make a scheduler step only when its optimizers do. Prepare those first."""
        return self._preparer.prepare_scheduler(scheduler)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and restore further objects that have `state_dict` and `load_state_dict`.

        Raises:
            UsageError: naming those that lack them.
        """
        self._state.register(objects)

    def unwrap_model(
        self, model: torch.nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = False
    ) -> torch.nn.Module:
        """Return the module behind a prepared one: neither wrapped for ranks nor compiled.

        Args:
            model: prepared or not.
            keep_fp32_wrapper: False also undoes what mixed precision did to its forward.
            keep_torch_compile: return it compiled, if the Accelerator compiles models.
        """
        return self._preparer.unwrap_model(
            model, keep_precision=keep_fp32_wrapper, keep_compiled=keep_torch_compile
        )

    @staticmethod
    def verify_device_map(model: torch.nn.Module) -> bool:
        """Whether a model is spread over several devices, as by `device_map="auto"`: ranks can't share it."""
        return any(len(getattr(module, "hf_device_map", ())) > 1 for module in model.modules())

    def free_memory(self, *objects: Any) -> tuple[None, ...]:
        """Finish saving and let go of everything that was prepared; steps, epochs and loops begin anew.

        Returns:
            One None for each argument, to assign to its names.

        Raises:
            BackgroundSaveError: a checkpoint could not be saved, and the policy says `on_error="raise"`. It
                is raised once all is let go of.
        """
        problem = self._saver.settle()
        self._preparer.clear()
        self._saver.begin_anew()
        if problem is not None:
            raise problem
        return tuple(None for _ in objects)

    clear = free_memory
