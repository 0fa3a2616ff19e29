"""The example of Population Based Training: it prints its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tune_digits_pbt.py"


def run(out: Path) -> list[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    command += ["--trials", "3", "--epochs", "2", "--seeds", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=True)
    return [line for line in done.stdout.splitlines() if " goes on from " not in line]


def test_it_prints_its_table(tmp_path: Path) -> None:
    printed = run(tmp_path)
    assert printed[0].split()[:3] == ["seed", "random", "search"]
    losses = [float(word) for word in printed[1].split()[1::2]]
    assert len(losses) == 2
    assert all(0 < loss < 3 for loss in losses)
    assert printed[2].startswith("PBT found the lower loss in")
    assert len(list(tmp_path.glob("*/journal.jsonl"))) == 2
