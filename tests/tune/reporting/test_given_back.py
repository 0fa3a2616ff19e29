"""A terminal that takes nothing more, or is gone: the experiment goes on, and what was said is not lost."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest
from rich.console import Console

from keepstep import tune
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.reporting.base import Overview, ProgressReporter
from keepstep.tune.reporting.live import LiveReporter

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


def console(file: TextIO) -> Console:
    return Console(file=file, force_terminal=True, width=80, height=30, _environ={"TERM": "xterm"})


def fit(path: Path, reporter: ProgressReporter, step: Callable[[int], None] = lambda _: None) -> None:
    def train(config: dict[str, Any]) -> None:
        for number in range(4):
            step(number)
            tune.report({"loss": 1.0})

    found = tune.Tuner(
        train,
        tune_config=tune.TuneConfig(metric="loss"),  # that it has no mode is said before all else
        run_config=tune.RunConfig(
            name="it", storage_path=path, executor="inline", progress_reporter=reporter
        ),
    ).fit()
    assert [result.metrics["training_iteration"] for result in found] == [4]


def fill(fd: int) -> None:
    """Until it takes nothing: what was written goes on to the other end by and by, and makes room."""
    refused = 0
    while refused < 5:
        try:
            os.write(fd, b"x" * 64)
            refused = 0
        except BlockingIOError:
            refused += 1
            time.sleep(0.02)


def emptied(fd: int) -> str:
    found = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 1 << 16):
            found += part
    return found.decode()


@pytest.mark.parametrize("full", [0, 2], ids=["when it is drawn first", "while it is drawn"])
def test_a_terminal_that_was_full_for_a_while_has_its_cursor_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    monkeypatch.setattr("keepstep.tune.reporting.live._EVERY_S", 0.0)
    monkeypatch.setattr("keepstep.tune.reporting.live._SHARE", 0.0)
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    os.set_blocking(slave, False)
    drawn: list[str] = []

    def step(number: int) -> None:
        if number == full:
            fill(slave)
        elif number == 3:
            drawn.append(emptied(master))

    output, out = sys.stdout, os.fdopen(slave, "w")
    if full == 0:
        fill(slave)
    try:
        fit(tmp_path, LiveReporter(console(out)), step)
        drawn.append(emptied(master))
    finally:
        os.close(master)
        with contextlib.suppress(OSError):
            out.close()
    assert sys.stdout is output
    text = "".join(drawn)
    assert text.rfind(SHOWN) > text.rfind(HIDDEN)
    assert "progress can't be shown any more, and the experiment goes on" in caplog.text
    assert ("no mode" in caplog.text) == (full == 0)  # else it stood there before


def test_what_a_closed_file_can_not_show_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = io.StringIO()
    gone.close()
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, LiveReporter(console(gone)))
    assert (
        "progress can't be shown any more, and the experiment goes on: I/O operation on closed" in caplog.text
    )
    assert "TuneConfig has metric='loss' and no mode" in caplog.text


def test_a_reporters_own_mistake_is_no_terminals(tmp_path: Path) -> None:
    class Wrong(ProgressReporter):
        def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
            return True

        def report(self, overview: Overview, done: bool) -> None:
            float("fast")

    with pytest.raises(ValueError, match="could not convert"):
        fit(tmp_path, Wrong())
