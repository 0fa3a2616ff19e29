"""What makes an experiment that experiment, as JSON: kept in its journal, compared, and made anew from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any, Final

from keepstep.errors import ExperimentExistsError, UsageError
from keepstep.tune.experiment.records import DriverStarted, ExperimentMade, Record
from keepstep.tune.schedulers.base import TrialScheduler
from keepstep.tune.search.base import Searcher
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
        "search_alg": _part(tune.search_alg),
        "scheduler": _part(tune.scheduler),
        "stop": described(run.stop),
        "max_concurrent_trials": tune.max_concurrent_trials,
        "time_budget_s": tune.budget_s,
        "reuse_actors": tune.reuse_actors,
        "checkpoint_config": asdict(run.checkpoint_config),
        "failure_config": asdict(run.failure_config),
        "byte_budget": run.byte_budget,
        "executor": run.executor if isinstance(run.executor, str) else None,
    }


def _part(part: Searcher | TrialScheduler | str | None) -> Any:
    if part is None or isinstance(part, str):
        return part
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class": name, "arguments": described(part.describe())}


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
            f"this one "
            "another RunConfig.name, or go on with that one by Tuner.restore"
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
        search_alg=_revived_part(spec["search_alg"], "search_alg", Searcher),
        scheduler=_revived_part(spec["scheduler"], "scheduler", TrialScheduler),
        max_concurrent_trials=spec["max_concurrent_trials"],
        time_budget_s=spec["time_budget_s"],
        reuse_actors=spec["reuse_actors"],
    )


def _run_config(spec: Mapping[str, Any]) -> RunConfig:
    lost = list(undescribed(spec["stop"]))
    if lost:
        raise UsageError(
            f"RunConfig.stop was {', '.join(what for _, what in lost)}, which is not kept with the "
            f"experiment: "
            "functions and objects are never pickled. Hand over run_config=RunConfig(stop=...) to "
            "Tuner.restore"
        )
    return RunConfig(
        stop=revived(spec["stop"], argument="stop"),
        checkpoint_config=CheckpointConfig(**spec["checkpoint_config"]),
        failure_config=FailureConfig(**spec["failure_config"]),
        byte_budget=spec["byte_budget"],
        executor=_executor(spec["executor"]),
    )


def _executor(said: str | None) -> str:
    if said is None:
        raise UsageError(
            "RunConfig.executor was an object, which is not kept with the experiment. Hand over "
            "run_config=RunConfig(executor=...) to Tuner.restore"
        )
    return said


def _revived_part(said: Any, argument: str, kind: type) -> Any:
    """A built-in scheduler or searcher of the same arguments."""
    if said is None or isinstance(said, str):
        return said
    found = _built_in(said["class"], kind)
    if found is None or said["arguments"] is None:
        raise UsageError(
            f"TuneConfig.{argument} was a {said['class']}, which is not kept with the experiment: "
            f"functions and "
            f"objects are never pickled. Hand over tune_config=TuneConfig({argument}=...) to Tuner.restore"
        )
    return found(**revived(said["arguments"], argument=argument))


def _built_in(name: str, kind: type) -> type | None:
    """A class of keepstep's own, imported already or not; None: it is somebody else's."""
    module, _, qualname = name.rpartition(".")
    if not module.startswith("keepstep.tune."):
        return None
    found = getattr(import_module(module), qualname, None)
    return found if inspect.isclass(found) and issubclass(found, kind) else None
