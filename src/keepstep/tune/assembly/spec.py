"""What makes an experiment that experiment, as JSON: kept in its journal, compared, and made anew from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from keepstep.errors import ExperimentExistsError, UsageError
from keepstep.tune.experiment.records import DriverStarted, ExperimentMade, Record
from keepstep.tune.search.description import described, differences, revived, undescribed
from keepstep.tune.settings import CheckpointConfig, FailureConfig, RunConfig, TuneConfig

__all__ = ["check_same", "newest_spec", "revive", "spec_of"]

_DECIDES: Final = ("param_space", "metric", "mode", "search_alg", "scheduler", "stop", "num_samples", "seed")
"""What may not change while an experiment goes on: with it, other trials would come, or other decisions."""


def spec_of(param_space: Mapping[str, Any], tune: TuneConfig, run: RunConfig) -> dict[str, Any]:
    """What the user says, as far as it makes the experiment what it is."""
    return {
        "param_space": described(dict(param_space)),
        "metric": tune.metric,
        "mode": tune.mode,
        "num_samples": tune.num_samples,
        "seed": tune.seed,
        "search_alg": described(tune.search_alg),
        "scheduler": described(tune.scheduler),
        "stop": described(run.stop),
        "max_concurrent_trials": tune.max_concurrent_trials,
        "time_budget_s": tune.budget_s,
        "reuse_actors": tune.reuse_actors,
        "checkpoint_config": asdict(run.checkpoint_config),
        "failure_config": asdict(run.failure_config),
        "byte_budget": run.byte_budget,
        "executor": described(run.executor),
    }


def newest_spec(records: list[Record]) -> dict[str, Any]:
    """What was said last: what does not decide may change from one start to the next."""
    spec: dict[str, Any] = {}
    for record in records:
        said = record.spec if isinstance(record, ExperimentMade | DriverStarted) else None
        if said is not None:
            spec = dict(said)
    return spec


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], address: str) -> None:
    """Whether what is asked for is the experiment that is there.

    Raises:
        ExperimentExistsError: it is another one; every difference is named.
    """
    found = [
        f"{name}: {difference}"
        for name in _DECIDES
        if not (name == "num_samples" and _grew(old.get(name), new.get(name)))
        for difference in differences(old.get(name), new.get(name))
    ]
    if found:
        shown = "\n  ".join(found[:20])
        raise ExperimentExistsError(
            f"{address} holds another experiment than this one, so nothing was changed:\n  {shown}\nGive "
            "this one another RunConfig.name, or go on with that one by Tuner.restore"
        )


def _grew(old: Any, new: Any) -> bool:
    """More samples of the same are no other experiment."""
    return isinstance(old, int) and isinstance(new, int) and (new == -1 or (old != -1 and new >= old))


def revive(
    spec: Mapping[str, Any], tune: TuneConfig | None, run: RunConfig | None
) -> tuple[TuneConfig, RunConfig]:
    """The configuration of an experiment, from its journal; what is handed over counts more.

    Args:
        spec: as `spec_of` made it.
        tune: None: all of it from the journal.
        run: likewise.

    Raises:
        UsageError: something can't be made anew, and has to be handed over.
    """
    return tune if tune is not None else _tune_config(spec), run if run is not None else _run_config(spec)


def _tune_config(spec: Mapping[str, Any]) -> TuneConfig:
    return TuneConfig(
        metric=spec["metric"],
        mode=spec["mode"],
        num_samples=spec["num_samples"],
        seed=spec["seed"],
        search_alg=_kept(spec, "search_alg", "TuneConfig"),
        scheduler=_kept(spec, "scheduler", "TuneConfig"),
        max_concurrent_trials=spec["max_concurrent_trials"],
        time_budget_s=spec["time_budget_s"],
        reuse_actors=spec["reuse_actors"],
    )


def _run_config(spec: Mapping[str, Any]) -> RunConfig:
    return RunConfig(
        stop=_kept(spec, "stop", "RunConfig"),
        checkpoint_config=CheckpointConfig(**spec["checkpoint_config"]),
        failure_config=FailureConfig(**spec["failure_config"]),
        byte_budget=spec["byte_budget"],
        executor=_kept(spec, "executor", "RunConfig"),
    )


def _kept(spec: Mapping[str, Any], name: str, owner: str) -> Any:
    """What was described, anew."""
    lost = [what for _, what in undescribed(spec[name])]
    if lost:
        argument = {"TuneConfig": "tune_config", "RunConfig": "run_config"}[owner]
        raise UsageError(
            f"{owner}.{name} was, or held, {', '.join(lost)}, which is not kept with the experiment: "
            f"functions and objects are never pickled. Hand over {argument}={owner}({name}=...) to "
            "Tuner.restore"
        )
    return revived(spec[name], argument=name)
