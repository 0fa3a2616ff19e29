"""What is small and the same on every rank: where the run stands.

Restoring is all or nothing: everything that could refuse is asked first. `SharedState` therefore only checks
and keeps what it is given, and puts it into effect once everything else is in place.
"""

from __future__ import annotations

from typing import Any, Protocol

from keepstep.errors import MismatchError
from keepstep.track.position import LogState
from keepstep.train.data.loader import PreparedLoader
from keepstep.train.precision import Precision
from keepstep.train.progress import Progress
from keepstep.train.step import AccumulationWindow, PreparedOptimizer, PreparedScheduler
from keepstep.world import World

__all__ = ["Run", "SharedState"]


class Run(Protocol):
    """What `SharedState` is of: see `TrainState`."""

    world: World
    precision: Precision
    window: AccumulationWindow
    progress: Progress
    seed: int | None
    optimizers: list[PreparedOptimizer]
    schedulers: list[PreparedScheduler]
    loaders: list[PreparedLoader]
    log: LogState

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...


class SharedState:
    """Progress, loaders, counters, the loss scale and the place in the log; the same on every rank.

    Args:
        run: what was prepared.
    """

    def __init__(self, run: Run) -> None:
        self._state = run
        self._received: dict[str, Any] | None = None

    def detach(self) -> None:
        """Let go of the run."""
        del self._state

    def state_dict(self) -> dict[str, Any]:
        """Plain values and small tensors."""
        state = self._state
        return {
            "seed": state.seed,
            "ranks": state.world.size,
            "precision": state.precision.name,
            "scaler": state.precision.state_dict(),
            "window": state.window.state_dict(),
            "schedulers": [type(prepared.scheduler).__qualname__ for prepared in state.schedulers],
            "steps": [[prepared.steps_done, prepared.step_was_skipped] for prepared in state.optimizers],
            "progress": state.progress.state_dict(),
            "loaders": [loader.state_dict() for loader in state.loaders],
            "log": state.log.state_dict(),
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
        if not done:
            return []
        inside = f"{done} micro-batches of an accumulation window done"
        different = (
            [] if was == now else [f"gradient_accumulation_steps was {was} and is {now} now, {inside}"]
        )
        ranks_were, ranks = saved["ranks"], self._state.world.size
        if ranks_were != ranks:
            different.append(f"{ranks_were} ranks had gradients of their own and are {ranks} now, {inside}")
        return different

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
        state.log.load_state_dict(saved["log"])

    def _note_earlier_steps(self) -> None:
        """Tell torch that optimizers have stepped; its schedulers would warn that they never did."""
        for prepared in self._state.schedulers:
            optimizer = getattr(prepared.scheduler, "optimizer", None)
            if optimizer is not None and self._state.step:
                optimizer._opt_called = True
