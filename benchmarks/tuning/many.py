"""`python many.py TRIALS DIRECTORY`: many short trials in one process; the experiment opened again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from keepstep import tune

TRIAL_S = 0.001


def function(config: dict[str, float]) -> None:
    time.sleep(TRIAL_S)
    tune.report({"loss": config["x"]})


class Curve(tune.Callback):
    """When each tenth of the trials was done: on the clock, and in CPU time of this process."""

    def __init__(self, trials: int) -> None:
        self._tenth = trials // 10
        self._done = 0
        self.moments = [(time.perf_counter(), time.process_time())]

    def on_trial_complete(self, *_: object, **__: object) -> None:
        self._done += 1
        if self._done % self._tenth == 0:
            self.moments.append((time.perf_counter(), time.process_time()))

    def ms_per_trial(self, clock: int) -> list[float]:
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [(after[clock] - before[clock]) / self._tenth * 1e3 for before, after in pairs]


def main(trials: int, directory: Path) -> None:
    curve = Curve(trials)
    tune.Tuner(
        function,
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(num_samples=trials, metric="loss", mode="min"),
        run_config=tune.RunConfig(
            name="many", storage_path=str(directory), executor="inline", verbose=0, callbacks=[curve]
        ),
    ).fit()
    journal = (directory / "many" / "journal.jsonl").stat().st_size
    before, cpu_before = time.perf_counter(), time.process_time()
    again = tune.Tuner.restore(str(directory / "many"), function).fit()
    found: dict[str, Any] = {
        "restore_s": time.perf_counter() - before,
        "restore_cpu_s": time.process_time() - cpu_before,
        "wall_ms": curve.ms_per_trial(0),
        "cpu_ms": curve.ms_per_trial(1),
        "journal_bytes": journal / trials,
    }
    assert len(again) == trials, len(again)
    print("MANY", json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
