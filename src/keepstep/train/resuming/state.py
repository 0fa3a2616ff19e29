"""What a run consists of, and the tree that the engine saves and restores.

    model, model_1, ...          the modules
    optimizer, optimizer_1, ...  the optimizers
    registered_0, ...            objects given to register_for_checkpointing
    train                        schedulers, and what is small: progress, loaders, counters, loss scale

and, for each rank, what is its own: generators, gradients that no step has used yet
({optimizer: {parameter: gradient}}), buffers that its forwards wrote to, what compressed gradients left over.

Restoring is all or nothing. The run's own parts only take note of what they are handed, and refuse what
doesn't fit while nothing is changed yet; `apply` puts it into effect once everything else is in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from keepstep.errors import MismatchError, RestoreError, UsageError
from keepstep.track.position import LogState
from keepstep.train.data.loader import PreparedLoader
from keepstep.train.gate import StagingGate, closed_gates
from keepstep.train.precision import Precision
from keepstep.train.progress import Progress
from keepstep.train.ranks.parallel import Parallel
from keepstep.train.resuming.compression import Compression
from keepstep.train.resuming.options import options_of, warn_of_replaced
from keepstep.train.resuming.rank_state import (
    Buffers,
    Generators,
    Gradients,
    buffers_of,
    dense_parts,
    numbered,
)
from keepstep.train.resuming.shared_state import SharedState
from keepstep.train.step import AccumulationWindow, PreparedOptimizer, PreparedScheduler
from keepstep.world import World

__all__ = ["Captured", "TrainState"]


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A state to save, or live objects to restore one into.

    Attributes:
        shared: what all ranks hold.
        own: what is this rank's own.
    """

    shared: dict[str, Any]
    own: dict[str, Any]


@dataclass(eq=False, kw_only=True)
class TrainState:
    """Everything that was prepared or registered, in order.

    Attributes:
        world: the ranks.
        parallel: how they share models.
        precision: of the run.
        window: of gradient accumulation.
        progress: epochs and passes.
        seed: of the data; None until the first loader is prepared.
        models: modules as they are saved, without wrappers.
        optimizers: prepared ones.
        schedulers: prepared ones.
        loaders: prepared ones.
        registered: objects with `state_dict` and `load_state_dict`.
        log: how far the run's log has come.
        ranks_apart: why ranks have other parameters at this instant; empty while they have the same.
        steps_differ: ranks may do different numbers of steps now, so they can't save together.
        gate: where optimizers wait until the state has been copied.
    """

    world: World
    parallel: Parallel
    precision: Precision
    window: AccumulationWindow
    progress: Progress
    seed: int | None
    models: list[torch.nn.Module] = field(default_factory=list)
    optimizers: list[PreparedOptimizer] = field(default_factory=list)
    schedulers: list[PreparedScheduler] = field(default_factory=list)
    loaders: list[PreparedLoader] = field(default_factory=list)
    registered: list[Any] = field(default_factory=list)
    log: LogState = field(default_factory=LogState)
    ranks_apart: str = ""
    steps_differ: bool = False
    gate: StagingGate = field(default_factory=StagingGate)
    _first_buffers: weakref.WeakKeyDictionary[torch.nn.Module, Any] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def __post_init__(self) -> None:
        _states.add(self)

    @property
    def step(self) -> int:
        """Optimizer steps done; with several optimizers, those of the one that did most."""
        return max((optimizer.steps_done for optimizer in self.optimizers), default=0)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was prepared or registered."""
        return not (self.models or self.optimizers or self.schedulers or self.loaders or self.registered)

    def note_buffers(self, model: torch.nn.Module) -> None:
        """Remember the buffers of a model that is about to be trained: those it has later may be others."""
        self._first_buffers[model] = buffers_of(model)

    def register(self, objects: tuple[Any, ...]) -> None:
        """Add objects to what is saved and restored.

        Raises:
            UsageError: one of them lacks a method; none is added.
        """
        lacking = [
            f"argument {number} ({type(value).__name__}) lacks {' and '.join(missing)}"
            for number, value in enumerate(objects)
            if (missing := _missing_methods(value))
        ]
        if lacking:
            raise UsageError(
                "register_for_checkpointing takes objects with both state_dict() and load_state_dict(), but "
                + "; ".join(lacking)
                + ". Add them to the class, or register an object that has them."
            )
        self.registered += [
            value for value in objects if not any(value is known for known in self.registered)
        ]

    def capture(self) -> Captured:
        """Return what to save. The values in it are live.

        Raises:
            UsageError: at this instant the state could not be restored.
        """
        if self.ranks_apart:
            raise UsageError(
                f"Ranks hold different parameters now ({self.ranks_apart}), so there is no one state to "
                "save. Save after they were averaged"
            )
        self.precision.check_capturable()
        self.parallel.check_capturable(self.models, inside_window=not self.window.sync_gradients)
        return Captured(
            shared=self._tree(SharedState(self).state_dict()),
            own={
                "generators": Generators().state_dict(),
                "gradients": Gradients(self.optimizers, self.world.size).state_dict(),
                "buffers": Buffers(self.models, self.world.size, self._first_buffers).state_dict(),
                "compression": Compression(self.models, self.parallel, self.world.size).state_dict(),
            },
        )

    def check_steps(self) -> None:
        """Raise UsageError if a rank may be waited for in vain."""
        if self.steps_differ:
            raise UsageError(
                "Inside join_uneven_inputs(..., even_batches=False) ranks may do different numbers of steps, "
                "and one that has no batch left would be waited for in vain. Save after the block, or have "
                "all ranks get the same number of batches: join_uneven_inputs(..., even_batches=True)"
            )

    def changing(self) -> list[torch.Tensor]:
        """What may change between two optimizer steps: buffers, by a forward; gradients; learning rates."""
        parameters = [p for optimizer in self.optimizers for p in optimizer.parameters()]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [
            *(buffer for module in self._modules for buffer in module.buffers()),
            *(part for p in parameters if p.grad is not None for part in dense_parts(p.grad)),
            *(value for group in groups for value in group.values() if isinstance(value, torch.Tensor)),
        ]

    def steady(self) -> Iterator[torch.Tensor]:
        """Shards that only optimizers write to, which wait: theirs, and frozen ones of the same models."""
        stepped = {id(p) for prepared in self.optimizers for p in prepared.parameters()}
        for model in self.models:
            parameters = list(model.parameters())
            if not stepped.isdisjoint(map(id, parameters)):
                yield from parameters
        for prepared in self.optimizers:
            for state in prepared.optimizer.state.values():
                if isinstance(state, dict):
                    yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    @property
    def _modules(self) -> list[torch.nn.Module]:
        return [m for m in [*self.models, *self.registered] if isinstance(m, torch.nn.Module)]

    def is_written_by(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer, prepared or not, changes something that is saved."""
        if any(optimizer is known for known in [*self.registered, *(p.optimizer for p in self.optimizers)]):
            return True
        saved = {id(parameter) for module in self._modules for parameter in module.parameters()}
        return any(
            id(parameter) in saved for group in optimizer.param_groups for parameter in group["params"]
        )

    def restore(self, load: Callable[[Captured], Any]) -> Any:
        """Restore everything, or nothing.

        Args:
            load: is given live objects and restores them; returns None if there was nothing to load.

        Raises:
            MismatchError: the checkpoint doesn't fit what was prepared; nothing was changed.
        """
        shared, generators = SharedState(self), Generators()
        gradients = Gradients(self.optimizers, self.world.size)
        buffers = Buffers(self.models, self.world.size, self._first_buffers)
        compression = Compression(self.models, self.parallel, self.world.size)
        own = {
            "generators": generators,
            "gradients": gradients,
            "buffers": buffers,
            "compression": compression,
        }
        before = self._options()
        try:
            loaded = load(Captured(shared=self._tree(shared), own=own))
            if loaded is not None:
                with self.world.meeting("putting a restored run into effect") as meeting:
                    for prepared in self.optimizers:
                        self.parallel.place_state(prepared.optimizer)
                    gradients.apply()
                    buffers.apply()
                    compression.apply()
                    shared.apply()
                    # Last, so that nothing which restoring draws can shift them.
                    generators.apply(seed=self.seed or 0, rank=self.world.rank, step=self.step)
                    self.progress.draws.note_restored()
                    meeting.exchange(b"")  # a sampler may have refused what it remembered
                warn_of_replaced(before, self._options())
            return loaded
        except RestoreError as error:
            if isinstance(error.__cause__, MismatchError):
                raise error.__cause__ from None
            raise
        finally:
            # Whoever keeps the tree must not keep worker processes alive through it: freed late, by the
            # garbage collector, they take seconds to stop.
            shared.detach()

    def _options(self) -> dict[str, Any]:
        return options_of(
            [prepared.optimizer for prepared in self.optimizers],
            [prepared.scheduler for prepared in self.schedulers],
        )

    def _tree(self, run: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        tree.update((numbered("model", index), model) for index, model in enumerate(self.models))
        tree.update(
            (numbered("optimizer", index), prepared.optimizer)
            for index, prepared in enumerate(self.optimizers)
        )
        # Before the registered objects: what refuses comes before what takes effect at once.
        tree["train"] = {"run": run, "schedulers": [prepared.scheduler for prepared in self.schedulers]}
        tree.update((f"registered_{index}", value) for index, value in enumerate(self.registered))
        return tree


_states: weakref.WeakSet[TrainState] = weakref.WeakSet()


def _wait_for_the_copy(optimizer: Optimizer, *_: Any) -> None:
    """Before any optimizer's step: torch does not count what a fused one writes, and no slip would show."""
    if torch.compiler.is_compiling() or not closed_gates:
        return
    for state in list(_states):
        if state.gate.pending is not None and state.is_written_by(optimizer):
            state.gate.wait()


register_optimizer_step_pre_hook(_wait_for_the_copy)


def _missing_methods(value: Any) -> list[str]:
    wanted = ("state_dict", "load_state_dict")
    return [
        f"{name}()" for name in wanted if isinstance(value, type) or not callable(getattr(value, name, None))
    ]
