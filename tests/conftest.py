"""What every test gets: one thread, known seeds, and a directory of its own when it asks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in every process that a test starts: several processes share the cores,
# and a sum over one thread comes out the same everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import hypothesis
import numpy as np
import pytest
import torch
from tests.crash.tally import Tally, summary, tally_of
from tests.holding import Held

torch.set_num_threads(1)
# Two processes on two cores stall now and then: a slow example is no failure, an irreproducible one is.
hypothesis.settings.register_profile("keepstep", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("keepstep")


def pytest_collection_finish() -> None:
    """What imports made stays: no garbage collection looks through all of it again, which takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def known_seeds() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is part of what keepstep captures
    torch.manual_seed(0)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh directory that is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Holds back the copies of saves while it is closed."""
    held = Held(monkeypatch)
    yield held
    held.opened.set()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts rounds, operations and flips; the sums are told at the end of the run."""
    return tally_of(request.node.user_properties)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = summary(report for reports in terminalreporter.stats.values() for report in reports)
    if lines:
        terminalreporter.section("what was survived")
        terminalreporter.write_line("\n".join(lines))
