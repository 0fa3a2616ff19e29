"""Drives an executor by hand, as the driver of an experiment does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keepstep.tune.executors.protocol import (
    Ended,
    Event,
    Executor,
    Failed,
    Go,
    Job,
    Next,
    Order,
    Reported,
    Saved,
    Started,
    Stop,
)

PATIENCE_S = 120.0
_numbers = itertools.count()


class Drive:
    """One executor, the events that came, and orders by rule."""

    def __init__(self, executor: Executor, root: Path) -> None:
        self.executor = executor
        self.root = root
        self.events: list[Event] = []
        self.waiting: dict[str, Event] = {}

    def job(self, trial: str = "", /, config: Mapping[str, Any] | None = None, **more: Any) -> Job:
        number = next(_numbers)
        trial = trial or f"trial_{number}"
        told: dict[str, Any] = {
            "run": f"{trial}#{number}",
            "trial_id": trial,
            "trial_name": f"name_of_{trial}",
            "experiment": "experiment",
            "config": dict(config or {}),
            "path": str(self.root / trial),
            "resources": {"cpu": 1.0},
            "stdout": str(self.root / trial / "stdout"),
            "stderr": str(self.root / trial / "stderr"),
            "lineage": f"lineage_{trial}",
        }
        return Job(**(told | more))

    def launch(self, trial: str = "", /, config: Mapping[str, Any] | None = None, **more: Any) -> Job:
        job = self.job(trial, config, **more)
        self.executor.launch(job)
        return job

    def of(self, run: str, kind: type | None = None) -> list[Any]:
        return [e for e in self.events if e.run == run and (kind is None or isinstance(e, kind))]

    def order(self, run: str, order: Order) -> None:
        self.waiting.pop(run, None)
        self.executor.order(run, order)

    def until(
        self, done: Callable[[], object], answer: Callable[[Event], Order | None] | None = None
    ) -> None:
        """Take news until something holds; answer those that wait."""
        end = time.monotonic() + PATIENCE_S
        while True:
            for run, event in list(self.waiting.items()) if answer is not None else []:
                order = answer(event)
                if order is not None:
                    self.order(run, order)
            if done():
                return
            assert time.monotonic() < end, f"it did not come about; there was: {self.events}"
            for event in self.executor.wait(0.2):
                self.events.append(event)
                if isinstance(event, Reported | Saved):
                    self.waiting[event.run] = event

    def event(self, run: str, kind: type) -> Any:
        """The first event of that kind."""
        self.until(lambda: self.of(run, kind))
        return self.of(run, kind)[0]

    def last(self, *runs: str, answer: Callable[[Event], Order | None] = lambda event: Go()) -> list[Any]:
        """Answer these until they are over; how each ended."""
        self.until(
            lambda: all(self.of(run, Ended) or self.of(run, Failed) for run in runs),
            lambda event: answer(event) if event.run in runs else None,
        )
        return [self.of(run)[-1] for run in runs]

    def run(
        self, trial: str = "", /, config: Mapping[str, Any] | None = None, **more: Any
    ) -> tuple[list[Any], Any]:
        """Run one trial, told to go on each time: its results, and how it ended."""
        job = self.launch(trial, config, **more)
        (end,) = self.last(job.run)
        return self.of(job.run, Reported), end


__all__ = ["Drive", "Ended", "Failed", "Go", "Next", "Reported", "Saved", "Started", "Stop"]
