"""A script of trials, run as it is by each library: `python trials.py MODULE JSON`.

It needs nothing but the standard library and the module. The JSON holds the fields of `Work`,
"directory" and "began": `time.time()` when the process was started.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOLD: dict[str, Any] = json.loads(sys.argv[2])
if TOLD["torch"]:
    import torch
tune: Any = importlib.import_module(sys.argv[1])
IMPORTED = time.time()


class Payload:
    """Bytes of a checkpoint; each save differs from the one before."""

    def __init__(self) -> None:
        self._bytes = bytearray(os.urandom(TOLD["checkpoint_bytes"]))

    def put(self, directory: str, number: int) -> None:
        for at in range(0, len(self._bytes), 4096):  # nothing that could be shared with the one before
            self._bytes[at : at + 8] = (number + 1).to_bytes(8)
        Path(directory, "model.bin").write_bytes(self._bytes)


def step(config: dict[str, float], number: int) -> dict[str, float]:
    time.sleep(TOLD["step_s"])
    found = float(torch.tensor(config["x"]) + number) if TOLD["torch"] else config["x"] + number
    return {"loss": found, "number": number}


def function(config: dict[str, float]) -> None:
    payload = Payload() if TOLD["checkpoint_bytes"] else None
    for number in range(TOLD["reports"]):
        found = step(config, number)
        if payload is None:
            tune.report(found)
            continue
        with tempfile.TemporaryDirectory(dir=TOLD["directory"]) as place:
            payload.put(place, number)
            tune.report(found, checkpoint=tune.Checkpoint.from_directory(place))


class Steps(tune.Trainable):  # type: ignore[misc]
    def setup(self, config: dict[str, float]) -> None:
        self.told = config
        self.number = -1

    def step(self) -> dict[str, object]:
        self.number += 1
        return step(self.told, self.number) | {"done": self.number + 1 >= TOLD["reports"]}

    def reset_config(self, config: dict[str, float]) -> bool:
        self.setup(config)
        return True

    def save_checkpoint(self, directory: str) -> None:
        Path(directory, "number").write_text(str(self.number))

    def load_checkpoint(self, directory: str) -> None:
        self.number = int(Path(directory, "number").read_text())


class First(tune.Callback):  # type: ignore[misc]
    """When the first result came to the driver."""

    at: float | None = None

    def on_trial_result(self, *_: object, **__: object) -> None:
        if self.at is None:
            self.at = time.time()


def main() -> None:
    is_class = TOLD["kind"] == "class"
    keeping = {"checkpoint_at_end": False} if is_class else {"num_to_keep": 1}
    first = First()
    grid = tune.Tuner(
        Steps if is_class else function,
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=TOLD["trials"],
            max_concurrent_trials=2,
            reuse_actors=is_class,
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=TOLD["directory"],
            verbose=0,
            callbacks=[first],
            checkpoint_config=tune.CheckpointConfig(**keeping),
        ),
    ).fit()
    assert len(grid) == TOLD["trials"], len(grid)
    assert grid.num_errors == 0, grid.errors
    for result in grid:
        assert result.metrics["training_iteration"] == TOLD["reports"], result.metrics
        if TOLD["checkpoint_bytes"]:
            with result.checkpoint.as_directory() as place:
                assert Path(place, "model.bin").stat().st_size == TOLD["checkpoint_bytes"]
    assert first.at is not None
    marks = {"imported": IMPORTED, "first": first.at, "fitted": time.time()}
    print("MARKS", json.dumps({name: at - TOLD["began"] for name, at in marks.items()}))


if __name__ == "__main__":
    main()
