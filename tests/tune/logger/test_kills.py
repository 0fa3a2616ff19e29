"""Files of trials whose driver was killed: after the next start they hold every result once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

SCRIPT = """
import sys, time
from keepstep import tune

def train(config):
    for step in range(1, 121):
        time.sleep(0.002 if config["wait"] else 0)
        more = {{"late": step}} if step > 60 else {{}}
        tune.report({{"loss": config["lr"] / step, **more}})

tune.Tuner(
    train,
    param_space={{"lr": tune.grid_search([1.0, 2.0]), "wait": True}},
    tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=1),
    run_config=tune.RunConfig(name="e", storage_path={root!r}, executor="inline", verbose=0),
).fit()
"""


def test_every_result_is_there_once_after_the_driver_was_killed(tmp_path: Path) -> None:
    script = SCRIPT.format(root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and process.poll() is None:
            found = list(tmp_path.glob("e/*_00000_*/result.json"))
            if found and found[0].read_bytes().count(b"\n") > 20:
                break
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait(60) != 0, "it ended before it was killed"
    (file,) = tmp_path.glob("e/*_00000_*/result.json")
    file.write_bytes(file.read_bytes()[:-30])  # as a power cut leaves what was not synced
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    directories = sorted(path.parent for path in tmp_path.glob("e/*/params.json"))
    assert len(directories) == 2
    for directory in directories:
        lines = [json.loads(line) for line in (directory / "result.json").read_text().splitlines()]
        assert [line["training_iteration"] for line in lines] == list(range(1, 121))
        assert [line.get("late") for line in lines] == [None] * 60 + list(range(61, 121))
        table = pd.read_csv(directory / "progress.csv")
        assert table["training_iteration"].tolist() == list(range(1, 121))
        assert table["late"].notna().sum() == 60
