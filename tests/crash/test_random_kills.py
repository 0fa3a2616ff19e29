"""Killed at random, again and again: what was announced as committed is there, whole, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.crash.rounds import KINDS
from tests.crash.tally import Tally, draw_seed, rounds


def play(root: Path, tally: Tally, kind: str, count: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.rounds", str(root), kind, str(draw_seed()), str(rounds(count))],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
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
