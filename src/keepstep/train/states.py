"""What a script may ask about its run without having the Accelerator at hand.

`AcceleratorState()` and `GradientState()` may be made anywhere; they show the Accelerator that was made last.
"""

from __future__ import annotations

from typing import Any

from keepstep.errors import UsageError
from keepstep.train.progress import Progress
from keepstep.train.ranks.process import DistributedType, PartialState
from keepstep.train.step import AccumulationWindow

__all__ = ["AcceleratorState", "GradientState", "accelerator_was_made"]

_latest: dict[str, Any] = {}


def _of_the_latest(what: str) -> Any:
    if what not in _latest:
        raise UsageError(f"There is no {what} before there is an Accelerator. Make the Accelerator first.")
    return _latest[what]


def accelerator_was_made() -> bool:
    """Whether this process, or one that it was forked from, has made an Accelerator."""
    return "AcceleratorState" in _latest


class AcceleratorState:
    """The set-up of a run: what `PartialState` shows, the precision and how ranks work together.

    Raises:
        UsageError: no Accelerator has been made.
    """

    _process: PartialState
    mixed_precision: str
    distributed_type: DistributedType

    def __init__(self) -> None:
        self.__dict__ = _of_the_latest("AcceleratorState").__dict__

    @classmethod
    def of(
        cls, process: PartialState, *, mixed_precision: str, distributed_type: DistributedType
    ) -> AcceleratorState:
        """Make the state that every instance shows from now on."""
        state = cls.__new__(cls)
        state.__dict__ = {
            "_process": process,
            "mixed_precision": mixed_precision,
            "distributed_type": distributed_type,
        }
        _latest["AcceleratorState"] = state
        return state

    def __getattr__(self, name: str) -> Any:
        if name == "_process":
            raise AttributeError(name)
        return getattr(self._process, name)

    @property
    def is_fsdp2(self) -> bool:
        """Whether parameters are sharded over the ranks."""
        return self.distributed_type == DistributedType.FSDP

    def __repr__(self) -> str:
        return f"{self._process!r}Mixed precision type: {self.mixed_precision}\n"


class GradientState:
    """Where a run stands between two optimizer steps.

    Raises:
        UsageError: no Accelerator has been made.
    """

    _window: AccumulationWindow
    _progress: Progress

    def __init__(self) -> None:
        self.__dict__ = _of_the_latest("GradientState").__dict__

    @classmethod
    def of(cls, window: AccumulationWindow, progress: Progress) -> GradientState:
        """Make the state that every instance shows from now on."""
        state = cls.__new__(cls)
        state.__dict__ = {"_window": window, "_progress": progress}
        _latest["GradientState"] = state
        return state

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch completes an optimizer step."""
        return self._window.sync_gradients

    @property
    def num_steps(self) -> int:
        """Micro-batches to an optimizer step."""
        return self._window.num_steps

    @property
    def adjust_scheduler(self) -> bool:
        """Whether schedulers count micro-batches in their own call counters."""
        return self._window.adjust_scheduler

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the loader that began last among the open ones has given out its last batch."""
        return self._progress.at_last_batch()

    @property
    def in_dataloader(self) -> bool:
        """Whether a loader is being iterated."""
        return self._progress.innermost() is not None

    @property
    def active_dataloader(self) -> Any:
        """The prepared loader that began last among those that are being iterated; None without one."""
        cursor = self._progress.innermost()
        return None if cursor is None else cursor.loader()

    @property
    def remainder(self) -> int:
        """Samples in the last step of the loader that began last which aren't there twice, over all ranks.

        0 if that step is a full one, -1 if it isn't known, or if no loader is being iterated.
        """
        cursor = self._progress.innermost()
        return -1 if cursor is None else cursor.remainder

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Gradient accumulation steps: {self.num_steps}\n"
        )
