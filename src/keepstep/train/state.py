"""What a run consists of, and the tree that the engine saves and restores.

    model, model_1, ...          the modules
    optimizer, optimizer_1, ...  the optimizers
    registered_0, ...            objects given to register_for_checkpointing
    gradients                    gradients that no step has used yet: {optimizer: {parameter: gradient}}
    train                        schedulers, and everything small: progress, loaders, generators, loss scale

Restoring is all or nothing. `gradients` and the run's own part only take note of what they are handed, and
refuse what doesn't fit while nothing is changed yet; `apply` puts it into effect once everything else is in
place. Generators come last, so nothing that restoring draws can shift them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from keepstep.errors import MismatchError, RestoreError, UsageError
from keepstep.train import rng
from keepstep.train.gate import StagingGate
from keepstep.train.loader import PreparedLoader
from keepstep.train.options import options_of, warn_of_replaced
from keepstep.train.precision import Precision
from keepstep.train.progress import Progress
from keepstep.train.step import AccumulationWindow, PreparedOptimizer, PreparedScheduler

__all__ = ["TrainState"]


@dataclass(eq=False, kw_only=True)
class TrainState:
    """Everything that was prepared or registered, in order.

    Attributes:
        precision: of the run.
        window: of gradient accumulation.
        progress: epochs and passes.
        seed: of the data; None until the first loader is prepared.
        models: modules as they are saved, without wrappers.
        optimizers: prepared ones.
        schedulers: prepared ones.
        loaders: prepared ones.
        registered: objects with `state_dict` and `load_state_dict`.
        gate: where optimizers wait until the state has been copied.
    """

    precision: Precision
    window: AccumulationWindow
    progress: Progress
    seed: int | None
    models: list[torch.nn.Module] = field(default_factory=list)
    optimizers: list[PreparedOptimizer] = field(default_factory=list)
    schedulers: list[PreparedScheduler] = field(default_factory=list)
    loaders: list[PreparedLoader] = field(default_factory=list)
    registered: list[Any] = field(default_factory=list)
    gate: StagingGate = field(default_factory=StagingGate)

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

    def capture(self) -> dict[str, Any]:
        """Return the tree to save. The values in it are live.

        Raises:
            UsageError: at this instant the state could not be restored.
        """
        self.precision.check_capturable()
        return self._tree(_RunState(self).state_dict(), _Gradients(self.optimizers).state_dict())

    def changing(self) -> list[torch.Tensor]:
        """What may change between two optimizer steps: buffers, by a forward; gradients; learning rates."""
        parameters = [p for optimizer in self.optimizers for p in optimizer.parameters()]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [
            *(buffer for module in self._modules for buffer in module.buffers()),
            *(parameter.grad for parameter in parameters if parameter.grad is not None),
            *(value for group in groups for value in group.values() if isinstance(value, torch.Tensor)),
        ]

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

    def restore(self, load: Callable[[dict[str, Any]], Any]) -> Any:
        """Restore everything, or nothing.

        Args:
            load: is given a tree of live objects and restores it; returns None if there was nothing to load.

        Raises:
            MismatchError: the checkpoint doesn't fit what was prepared; nothing was changed.
        """
        run, gradients = _RunState(self), _Gradients(self.optimizers)
        before = self._options()
        try:
            loaded = load(self._tree(run, gradients))
            if loaded is not None:
                gradients.apply()
                run.apply()
                warn_of_replaced(before, self._options())
            return loaded
        except RestoreError as error:
            if isinstance(error.__cause__, MismatchError):
                raise error.__cause__ from None
            raise
        finally:
            # Whoever keeps the tree must not keep worker processes alive through it: freed late, by the
            # garbage collector, they take seconds to stop.
            run.detach()

    def _options(self) -> dict[str, Any]:
        return options_of(
            [prepared.optimizer for prepared in self.optimizers],
            [prepared.scheduler for prepared in self.schedulers],
        )

    def _tree(self, run: Any, gradients: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        tree.update((_numbered("model", index), model) for index, model in enumerate(self.models))
        tree.update(
            (_numbered("optimizer", index), prepared.optimizer)
            for index, prepared in enumerate(self.optimizers)
        )
        # Before the registered objects: what refuses comes before what takes effect at once.
        tree["gradients"] = gradients
        tree["train"] = {"run": run, "schedulers": [prepared.scheduler for prepared in self.schedulers]}
        tree.update((f"registered_{index}", value) for index, value in enumerate(self.registered))
        return tree


_states: weakref.WeakSet[TrainState] = weakref.WeakSet()


def _wait_for_the_copy(optimizer: Optimizer, *_: Any) -> None:
    """Before any optimizer's step: torch does not count what a fused one writes, and no slip would show."""
    if torch.compiler.is_compiling():
        return
    for state in list(_states):
        if state.gate.pending is not None and state.is_written_by(optimizer):
            state.gate.wait()


register_optimizer_step_pre_hook(_wait_for_the_copy)


def _numbered(kind: str, index: int) -> str:
    return kind if index == 0 else f"{kind}_{index}"


def _missing_methods(value: Any) -> list[str]:
    wanted = ("state_dict", "load_state_dict")
    return [
        f"{name}()" for name in wanted if isinstance(value, type) or not callable(getattr(value, name, None))
    ]


class _Gradients:
    """Gradients that no step has used yet."""

    def __init__(self, optimizers: list[PreparedOptimizer]) -> None:
        self._optimizers = optimizers
        self._received: dict[str, dict[str, torch.Tensor]] = {}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """{optimizer: {index of the parameter: gradient}}; without those that have none that count.

        A zero is not the same as None: the optimizer applies momentum and decay to the one and not the other.
        """
        found = {
            _numbered("optimizer", number): {
                str(index): parameter.grad
                for index, parameter in enumerate(optimizer.parameters())
                if parameter.grad is not None
            }
            for number, optimizer in enumerate(self._optimizers)
            if not optimizer.has_spent_gradients
        }
        return {key: gradients for key, gradients in found.items() if gradients}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Check that the gradients have parameters, and keep them."""
        parameters = {
            _numbered("optimizer", number): optimizer.parameters()
            for number, optimizer in enumerate(self._optimizers)
        }
        different = [
            f"gradients/{key}/{index}: no parameter of shape {list(gradient.shape)} is there now"
            for key, gradients in state.items()
            for index, gradient in gradients.items()
            if not _has_shape(parameters.get(key, []), int(index), gradient.shape)
        ]
        if different:
            raise MismatchError("The saved gradients don't fit the optimizers.", different=different)
        self._received = state

    def apply(self) -> None:
        """Set every gradient as it was: None where none was pending."""
        for number, optimizer in enumerate(self._optimizers):
            saved = self._received.get(_numbered("optimizer", number))
            optimizer.forget_gradients(pending=saved is not None)
            for index, parameter in enumerate(optimizer.parameters()):
                gradient = None if saved is None else saved.get(str(index))
                parameter.grad = (
                    None
                    if gradient is None
                    else torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
                )


def _has_shape(parameters: list[torch.nn.Parameter], index: int, shape: torch.Size) -> bool:
    return index < len(parameters) and parameters[index].shape == shape


class _RunState:
    """Everything small: progress, loaders, counters, loss scale and generators."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._received: dict[str, Any] | None = None

    def detach(self) -> None:
        """Let go of the run."""
        del self._state

    def state_dict(self) -> dict[str, Any]:
        """Plain values and small tensors."""
        state = self._state
        return {
            "seed": state.seed,
            "precision": state.precision.name,
            "scaler": state.precision.state_dict(),
            "window": state.window.state_dict(),
            "schedulers": [type(prepared.scheduler).__qualname__ for prepared in state.schedulers],
            "steps": [[prepared.steps_done, prepared.step_was_skipped] for prepared in state.optimizers],
            "progress": state.progress.state_dict(),
            "loaders": [loader.state_dict() for loader in state.loaders],
            "rng": rng.capture(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Check that it fits, and keep it."""
        different = [
            *self._precision_differences(saved),
            *self._window_differences(saved),
            *self._scheduler_differences(saved),
            *self._loader_differences(saved),
        ]
        if different:
            raise MismatchError(
                "The checkpoint doesn't fit this run; nothing was changed. Prepare the same schedulers and "
                "loaders with the same settings, or start a new project_dir.",
                different=different,
            )
        self._received = saved

    def _precision_differences(self, saved: dict[str, Any]) -> list[str]:
        was, now = saved["precision"], self._state.precision.name
        return [] if was == now else [f"mixed_precision was {was!r} and is {now!r} now"]

    def _window_differences(self, saved: dict[str, Any]) -> list[str]:
        done, was = saved["window"]["micro_batches"], saved["window"]["num_steps"]
        now = self._state.window.num_steps
        if not done or was == now:
            return []
        return [
            f"gradient_accumulation_steps was {was} and is {now} now, {done} micro-batches of a window done"
        ]

    def _scheduler_differences(self, saved: dict[str, Any]) -> list[str]:
        # Schedulers take whatever state they are handed, another kind's too.
        kinds = [type(prepared.scheduler).__qualname__ for prepared in self._state.schedulers]
        return [
            f"scheduler {number} was {was} and is {now} now"
            for number, (was, now) in enumerate(zip(saved.get("schedulers", []), kinds, strict=False))
            if was != now
        ]

    def _loader_differences(self, saved: dict[str, Any]) -> list[str]:
        loaders, states = self._state.loaders, saved["loaders"]
        if len(loaders) != len(states):
            return [f"{len(states)} loaders were prepared and {len(loaders)} are now"]
        return [
            f"loader {number}, saved after {cursor['position']} batches of a pass: {difference}"
            for number, (loader, state) in enumerate(zip(loaders, states, strict=True))
            if (cursor := saved["progress"]["cursors"][number])["active"]
            for difference in loader.differences(state)
        ]

    def apply(self) -> None:
        """Put what was kept into effect."""
        saved, state = self._received, self._state
        if saved is None:
            return
        state.seed = saved["seed"]
        if saved["scaler"] is not None:
            state.precision.load_state_dict(saved["scaler"])
        state.window.load_state_dict(saved["window"])
        for prepared, (steps, skipped) in zip(state.optimizers, saved["steps"], strict=True):
            prepared.steps_done, prepared.step_was_skipped = steps, skipped
        self._note_earlier_steps()
        state.progress.load_state_dict(saved["progress"])
        for loader, loader_state in zip(state.loaders, saved["loaders"], strict=True):
            loader.seed = saved["seed"]
            loader.load_state_dict(loader_state)
        rng.restore(saved["rng"])

    def _note_earlier_steps(self) -> None:
        """Tell torch that optimizers have stepped; its schedulers would warn that they never did."""
        for prepared in self._state.schedulers:
            optimizer = getattr(prepared.scheduler, "optimizer", None)
            if optimizer is not None and self._state.step:
                optimizer._opt_called = True
