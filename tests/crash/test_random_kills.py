"""Killed at random, again and again: what was announced as committed is there, whole, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tests.crash.rounds
from tests.crash.rounds import KINDS
from tests.crash.tally import Tally, draw_seed, rounds
from tests.forked import run_program


def play(root: Path, tally: Tally, kind: str, count: int) -> dict[str, int]:
    program = Path(tests.crash.rounds.__file__)
    done = run_program(program, root, kind, draw_seed(), rounds(count), timeout_s=3600)
    assert done.returncode == 0, done.stdout
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    tally(f"random kills: {kind}", counts["kills"])
    tally("random kills that fell within a save", counts["in a save"])
    tally("checkpoints announced before a kill", counts["announced"])
    tally("checkpoints verified and compared after a kill", counts["verified"])
    tally("damaged checkpoints passed over by a resume", counts["passed over"])
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_kills(tmp_path: Path, tally: Tally, kind: str) -> None:
    counts = play(tmp_path, tally, kind, 8)
    assert counts["verified"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_kills(tmp_path: Path, tally: Tally, kind: str) -> None:
    counts = play(tmp_path, tally, kind, 200)
    assert counts["in a save"] > 20
    assert counts["announced"] > 100
    assert kind != "damaged" or counts["passed over"] > 20
