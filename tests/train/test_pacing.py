"""Frequency in a real run: costs, counts and what a checkpoint says of them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.holding import at_call
from tests.train.failing import fail_once

from keepstep import Accelerator, CheckpointPolicy, PendingSave, Store
from keepstep.train.pace.counts import CheckpointCounts
from keepstep.train.pace.pacing import Pacer
from keepstep.train.pace.schedule import Due


class Run:
    """A small prepared run, and a lock that holds its commits back."""

    def __init__(self, project: Path, policy: CheckpointPolicy) -> None:
        torch.manual_seed(1)
        self.accelerator = Accelerator(cpu=True, project_dir=project, checkpoint_policy=policy)
        model = torch.nn.Linear(4, 1)
        self.model, self.optimizer = self.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.1)
        )

    def step(self) -> bool:
        self.accelerator.backward(self.model(torch.ones(2, 4)).pow(2).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.checkpoint() is not None

    @contextmanager
    def slow_disk(self) -> Iterator[threading.Event]:
        """Commits wait until the event is set."""
        store, gate = self.accelerator._saver._store, threading.Event()
        assert store is not None
        commit = store._saves._committed

        def wait_and_commit(*arguments: Any) -> Any:
            gate.wait(30)
            return commit(*arguments)

        store._saves._committed = wait_and_commit  # type: ignore[method-assign]
        try:
            yield gate
        finally:
            gate.set()
            store._saves._committed = commit  # type: ignore[method-assign]


def test_skips_and_waits_are_counted_as_the_policy_says(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointPolicy(every_n_steps=2, when_busy="skip"))
    with run.slow_disk() as gate:
        assert [run.step() for _ in range(6)] == [False, True, False, False, False, False]
        assert run.accelerator.checkpoint_counts == CheckpointCounts(skipped=1)
        gate.set()
        run.accelerator.wait_for_checkpoint()
    assert run.step(), "what was put off comes as soon as the writer is free"
    run.accelerator.wait_for_checkpoint()
    assert run.accelerator.checkpoint_counts == CheckpointCounts(saved=2, skipped=1)
    assert [c.step for c in Store(tmp_path / "checkpoints").list()] == [2, 7]


def test_a_checkpoint_due_by_steps_waits_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, CheckpointPolicy(every_n_steps=1))
    with run.slow_disk() as gate:
        assert run.step()
        at_call(monkeypatch, PendingSave, "wait", lambda: threading.Timer(0.1, gate.set).start())
        assert run.step()
        run.accelerator.wait_for_checkpoint()
    counts = run.accelerator.checkpoint_counts
    assert (counts.saved, counts.skipped, counts.waited) == (2, 0, 1)
    assert 0.05 < counts.waited_s < 10


def test_saves_by_hand_and_failures_are_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointPolicy(every_n_steps=1, on_error="warn"))
    run.accelerator.save_state()
    run.accelerator.save_state(tmp_path / "elsewhere")
    store = run.accelerator._saver._store
    assert store is not None
    fail_once(store)
    run.step()
    while store.busy:
        time.sleep(0.01)
    run.step()
    run.accelerator.wait_for_checkpoint()
    assert run.accelerator.checkpoint_counts == CheckpointCounts(saved=3, failed=1)


def test_each_checkpoint_says_what_was_chosen(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointPolicy(every_n_steps=4))
    for _ in range(9):
        run.step()
        run.accelerator.wait_for_checkpoint()
    newest = Store(tmp_path / "checkpoints").latest()
    assert newest is not None
    saving = newest.manifest.environment["saving"]
    assert saving["rule"] == "every_n_steps=4"
    assert saving["cost"]["blocked_s"] > 0
    assert saving["interval_steps"] >= 1
    assert saving["counts"]["saved"] == 1
    assert json.dumps(saving)


class Clock:
    """Moved by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Fake:
    """A save of which only the times matter."""

    blocked_s = 0.1
    failed = False

    def done(self) -> bool:
        return True


def test_what_was_chosen_is_logged_when_it_changes_and_not_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    pacer = Pacer(CheckpointPolicy(max_overhead=0.01), waited_s=lambda: 0.0, clock=clock)

    def run(steps: int, blocked_s: float) -> None:
        for _ in range(steps):
            run.step += 1  # type: ignore[attr-defined]
            clock.now_s += 1.0
            if pacer.ask(run.step, busy=False) is Due.YES:  # type: ignore[attr-defined]
                entered_s = clock.now_s
                clock.now_s += blocked_s
                pacer.began(run.step, entered_s, Fake(), behind=False)  # type: ignore[arg-type,attr-defined]
            pacer.leave(busy=False)

    run.step = 0  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO, logger="keepstep.train.pace.pacing"):
        run(500, 0.1)
        assert len(caplog.records) == 1
        assert "max_overhead=0.01: one save every 9.9 s, about 10 steps" in caplog.text
        run(1000, 0.5)
        assert 2 <= len(caplog.records) <= 4
        before = len(caplog.records)
        run(1000, 0.5)
        assert len(caplog.records) == before
    assert pacer.counts.saved > 50
    assert len(pacer._under_way) == 0


def test_what_happens_between_a_save_by_hand_and_the_next_step_is_no_step() -> None:
    clock = Clock()
    pacer = Pacer(CheckpointPolicy(every_n_steps=1000), waited_s=lambda: 0.0, clock=clock)
    for step in range(1, 20):
        clock.now_s += 1.0
        pacer.ask(step, busy=False)
        pacer.leave(busy=False)
        if step > 5:
            clock.now_s += 100.0
            pacer.saved_by_hand(step)
    assert pacer._meter.step_s == 1.0
