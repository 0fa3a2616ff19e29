"""What `prepare` does to each kind of object.

Prepared twice, an object gives the same prepared one; what another Accelerator prepared is prepared anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from keepstep.errors import NotPreparedError, UsageError
from keepstep.train.compiling import compiled
from keepstep.train.data.loader import PreparedLoader
from keepstep.train.data.shares import Share
from keepstep.train.data.sources import make_source
from keepstep.train.placement import LeaveInPlace, Placement
from keepstep.train.ranks.alike import check_models_alike
from keepstep.train.ranks.parallel import Parallel, without_wrappers
from keepstep.train.resuming.state import TrainState
from keepstep.train.settings.config import DataLoaderConfiguration
from keepstep.train.settings.plugins import TorchDynamoPlugin
from keepstep.train.step import PreparedOptimizer, PreparedScheduler
from keepstep.tree import is_stateful

__all__ = ["Preparer"]

_log = logging.getLogger(__name__)


class Preparer:
    """Turns the user's objects into prepared ones and enters them into the run's state.

    Args:
        state: of the run.
        device: where models go; None leaves them where they are.
        placement: what happens to batches.
        parallel: how ranks share a model.
        compiling: how models are compiled.
        loading: how loaders are prepared.
        step_with_optimizer: schedulers step only when their optimizers do.
        at_pass_start: called when a loader begins a new pass.
        scheduler_steps: of a scheduler to each of an optimizer: as many as there are ranks, as their batches
            come beside one another, or 1.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        device: torch.device | None,
        placement: Placement,
        parallel: Parallel,
        compiling: TorchDynamoPlugin,
        loading: DataLoaderConfiguration,
        step_with_optimizer: bool,
        scheduler_steps: int,
        at_pass_start: Callable[[], None] | None,
    ) -> None:
        self._state = state
        self._device = device
        self._placement = placement
        self._parallel = parallel
        self._compiling = compiling
        self._loading = loading
        self._step_with_optimizer = step_with_optimizer
        self._scheduler_steps = scheduler_steps
        self._at_pass_start = at_pass_start
        self._wrapped: dict[int, torch.nn.Module] = {}

    def prepare(self, objects: tuple[Any, ...]) -> tuple[Any, ...]:
        """Prepare each object by its type: models first, schedulers last, as they look for optimizers."""
        models = [self.prepare_model(v) if isinstance(v, torch.nn.Module) else v for v in objects]
        others = [value if _is_scheduler(value) else self._by_type(value) for value in models]
        return tuple(self.prepare_scheduler(value) if _is_scheduler(value) else value for value in others)

    def _by_type(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return value
        if isinstance(value, Optimizer):
            return self.prepare_optimizer(value)
        if isinstance(value, DataLoader):
            return self.prepare_loader(value)
        if is_stateful(value) and not any(value is known for known in self._state.registered):
            _log.warning(
                "prepare() was given a %s and returns it unchanged: its state is not saved. Pass it to "
                "register_for_checkpointing() as well.",
                type(value).__qualname__,
            )
        return value

    def prepare_model(
        self, model: torch.nn.Module, *, on_device: bool = True, evaluation: bool = False
    ) -> torch.nn.Module:
        """Move a model to the device, make it run in the run's precision, and share it among the ranks.

        Args:
            model: compiled or not.
            on_device: move it.
            evaluation: it is not trained: ranks need not exchange gradients.
        """
        _require(model, torch.nn.Module, "prepare_model")
        inner = without_wrappers(model)
        if any(inner is known for known in self._state.models):
            return self._wrapped.get(id(inner), model)
        check_models_alike(self._state.world, inner, self._settings())
        device = self._device if on_device else None
        if device is not None:
            model.to(device)
        self._state.models.append(inner)
        wrapped = self._state.precision.prepare_model(model)
        if not evaluation:
            wrapped = self._parallel.wrap(wrapped, device)
        wrapped = compiled(wrapped, self._compiling)
        self._wrapped[id(inner)] = wrapped
        self._state.note_buffers(inner)
        return wrapped

    def _settings(self) -> dict[str, object]:
        """What has to be the same on all ranks."""
        return {
            "distributed_type": self._parallel.kind,
            "mixed_precision": self._state.precision.name,
            "gradient_accumulation_steps": self._state.window.num_steps,
            "split_batches": self._loading.split_batches,
            "even_batches": self._loading.even_batches,
            "dispatch_batches": self._loading.dispatch_batches,
            "step_scheduler_with_optimizer": self._step_with_optimizer,
        }

    def prepare_optimizer(self, optimizer: Optimizer) -> PreparedOptimizer:
        """Make an optimizer step only when gradients are complete."""
        for known in self._state.optimizers:
            if optimizer is known or optimizer is known.optimizer:
                return known
        if isinstance(optimizer, PreparedOptimizer):  # by another Accelerator, as in a notebook's second run
            optimizer = optimizer.optimizer
        _require(optimizer, Optimizer, "prepare_optimizer")
        state = self._state
        self._parallel.adopt(optimizer)
        prepared = PreparedOptimizer(
            optimizer,
            window=state.window,
            precision=state.precision,
            gate=state.gate,
            before_first_step=self._require_models,
            before_step=state.progress.note_training,
        )
        self._state.optimizers.append(prepared)
        return prepared

    def _require_models(self, optimizer: Optimizer) -> None:
        """An optimizer steps parameters of prepared models: others are not saved, nor shared by ranks."""
        state = self._state
        modules = [*state.models, *(v for v in state.registered if isinstance(v, torch.nn.Module))]
        known = {id(parameter) for module in modules for parameter in module.parameters()}
        unknown = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
        if not unknown:
            return
        what = (
            f"{type(optimizer).__name__} steps {len(unknown)} parameters (the first of shape "
            f"{list(unknown[0].shape)}) that belong to no prepared model"
        )
        if state.world.size > 1:
            raise NotPreparedError(
                f"{what}: {state.world.size} ranks would train different ones. Pass the model to prepare(), "
                "and make the optimizer of the parameters of that same model."
            )
        _log.warning("%s: no checkpoint holds them. Pass the model to prepare() as well.", what)

    def prepare_loader(self, loader: DataLoader[Any], *, on_device: bool = True) -> PreparedLoader:
        """Make a DataLoader's order exact and resumable; its batches go to the device, or stay in place."""
        for known in self._state.loaders:
            if loader is known or loader is known.prepared_from:
                return known
        if isinstance(loader, PreparedLoader):
            loader = loader.prepared_from
        _require(loader, DataLoader, "prepare_data_loader")
        if self._state.seed is None:
            # Not earlier: scripts seed before or after they make the Accelerator; not each rank its own.
            self._state.seed = self._state.world.broadcast(torch.initial_seed())
        world, loading = self._state.world, self._loading
        share = Share(
            rank=world.rank, size=world.size, split=loading.split_batches, even=loading.even_batches
        )
        prepared = PreparedLoader(
            loader,
            source=make_source(loader, share=share, world=world, dispatch=loading.dispatch_batches),
            share=share,
            at_start=self._at_pass_start,
            placement=self._placement if on_device else LeaveInPlace(),
            progress=self._state.progress,
            seed=self._state.seed,
        )
        self._state.loaders.append(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """Make a scheduler step only when its optimizers do: its own one if prepared, else all."""
        for known in self._state.schedulers:
            if scheduler is known or scheduler is known.scheduler:
                return known
        if isinstance(scheduler, PreparedScheduler):
            scheduler = scheduler.scheduler
        if not (is_stateful(scheduler) and hasattr(scheduler, "step")):
            raise UsageError(
                f"prepare_scheduler() was given a {type(scheduler).__qualname__}; it takes an object with "
                "step(), state_dict() and load_state_dict()."
            )
        optimizers = self._state.optimizers
        its_own = getattr(scheduler, "optimizer", None)
        mine = [known for known in optimizers if its_own is known or its_own is known.optimizer]
        prepared = PreparedScheduler(
            scheduler,
            optimizers=mine or optimizers,
            window=self._state.window,
            step_with_optimizer=self._step_with_optimizer,
            times=self._scheduler_steps,
        )
        self._state.schedulers.append(prepared)
        return prepared

    def unwrap_model(
        self, model: torch.nn.Module, *, keep_precision: bool, keep_compiled: bool = False
    ) -> torch.nn.Module:
        """Return the module behind a prepared or compiled one; see `Accelerator.unwrap_model`."""
        inner = without_wrappers(model)
        if keep_compiled and keep_precision:
            return compiled(inner, self._compiling)
        return inner if keep_precision else self._state.precision.restore_model(inner)

    def clear(self) -> None:
        """Forget everything that was prepared or registered."""
        state = self._state
        for known in (state.models, state.optimizers, state.schedulers, state.loaders, state.registered):
            known.clear()
        state.progress.clear()
        self._wrapped.clear()


def _require(value: object, kind: type, method: str) -> None:
    if not isinstance(value, kind):
        raise UsageError(
            f"{method}() was given a {type(value).__qualname__}; it takes a {kind.__qualname__} of torch's."
        )


def _is_scheduler(value: Any) -> bool:
    """PyTorch's, a prepared one, or another library's: something with a state that steps an optimizer."""
    if isinstance(value, LRScheduler | PreparedScheduler):
        return True
    other_kind = isinstance(value, torch.nn.Module | Optimizer | DataLoader)
    return not other_kind and is_stateful(value) and hasattr(value, "step") and hasattr(value, "optimizer")
