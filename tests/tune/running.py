"""Experiments named "it" of trials that run one at a time in this process, and say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keepstep import tune


def run_config(tmp_path: Path, **more: Any) -> tune.RunConfig:
    """What is said in `more` goes first."""
    return tune.RunConfig(
        **{"name": "it", "storage_path": tmp_path, "executor": "inline", "verbose": 0, **more}
    )


def tuner(
    tmp_path: Path,
    trainable: Any,
    space: dict[str, Any] | None = None,
    said: tune.TuneConfig | None = None,
    **more: Any,
) -> tune.Tuner:
    """An experiment; `more` is of its `RunConfig`."""
    return tune.Tuner(
        trainable,
        param_space=space or {},
        tune_config=said or tune.TuneConfig(),
        run_config=run_config(tmp_path, **more),
    )
