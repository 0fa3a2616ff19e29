"""`tune.run`, for scripts from before `Tuner`."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from keepstep.errors import ExperimentExistsError, TrialError, UsageError
from keepstep.tune.analysis import ExperimentAnalysis
from keepstep.tune.assembly.opening import address_of
from keepstep.tune.callback import Callback
from keepstep.tune.registry import named_trainable
from keepstep.tune.reporting.base import ProgressReporter
from keepstep.tune.results import ResultGrid
from keepstep.tune.schedulers.base import TrialScheduler
from keepstep.tune.search.base import Searcher
from keepstep.tune.settings import CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from keepstep.tune.trainable.bundles import PlacementGroupFactory
from keepstep.tune.trainable.resources import with_resources
from keepstep.tune.tuner import Tuner

__all__ = ["run"]


def run(
    run_or_experiment: str | Callable[[dict[str, Any]], Any] | type,
    *,
    name: str | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    stop: Any = None,
    time_budget_s: float | dt.timedelta | None = None,
    config: Mapping[str, Any] | None = None,
    resources_per_trial: Mapping[str, float] | PlacementGroupFactory | None = None,
    num_samples: int = 1,
    storage_path: str | os.PathLike[str] | None = None,
    search_alg: Searcher | str | None = None,
    scheduler: TrialScheduler | str | None = None,
    checkpoint_config: CheckpointConfig | None = None,
    verbose: int = 1,
    progress_reporter: ProgressReporter | None = None,
    log_to_file: bool | str | tuple[str, str] = False,
    trial_name_creator: Callable[[Any], str] | None = None,
    trial_dirname_creator: Callable[[Any], str] | None = None,
    max_failures: int = 0,
    fail_fast: bool | Literal["raise"] = False,
    resume: bool | str | None = None,
    reuse_actors: bool = False,
    raise_on_failed_trial: bool = True,
    callbacks: Sequence[Callback] | None = None,
    max_concurrent_trials: int | None = None,
) -> ExperimentAnalysis:
    """Run an experiment, as `Tuner(...).fit()` does; arguments are those of `TuneConfig` and `RunConfig`.

    Args:
        run_or_experiment: the trainable, or the name that it was registered by.
        name: of the experiment.
        metric: what counts.
        mode: "min" or "max".
        stop: what ends trials.
        time_budget_s: seconds for all of it.
        config: the search space: `Tuner`'s `param_space`.
        resources_per_trial: {"cpu": 1, "gpu": 0.5}, or bundles; None: one CPU.
        num_samples: how many configurations.
        storage_path: the directory, or address, that holds experiments.
        search_alg: who suggests configurations.
        scheduler: who decides which trials go on.
        checkpoint_config: which checkpoints are made and kept.
        verbose: 0: silent; 1: progress; 2: and what the trials print.
        progress_reporter: who shows what goes on.
        log_to_file: as in `RunConfig`.
        trial_name_creator: the name of a trial, from the trial.
        trial_dirname_creator: the name of its directory.
        max_failures: how often a trial is started again.
        fail_fast: whether the first failure ends all.
        resume: None or "AUTO": an experiment of that name goes on if it is there. True, "LOCAL", "REMOTE": it
            must be. Followed by "+ERRORED" or "+RESTART_ERRORED": failed trials go on, or begin anew.
            False: it must not be there.
        reuse_actors: whether a class's process goes on with the next trial.
        raise_on_failed_trial: raise when a trial failed for good, once all are done.
        callbacks: told of everything.
        max_concurrent_trials: most trials at a time.

    Raises:
        TrialError: trials failed, and `raise_on_failed_trial`.
        ExperimentExistsError: `resume` is False, and it is there.
        UsageError: an argument can't be; and as for `Tuner`.
    """
    trainable = named_trainable(run_or_experiment)
    if resources_per_trial is not None:
        trainable = with_resources(trainable, resources_per_trial)
    tune_config = TuneConfig(
        metric=metric,
        mode=mode,
        search_alg=search_alg,
        scheduler=scheduler,
        num_samples=num_samples,
        max_concurrent_trials=max_concurrent_trials,
        time_budget_s=time_budget_s,
        reuse_actors=reuse_actors,
        trial_name_creator=trial_name_creator,
        trial_dirname_creator=trial_dirname_creator,
    )
    run_config = RunConfig(
        name=name,
        storage_path=storage_path,
        stop=stop,
        checkpoint_config=checkpoint_config or CheckpointConfig(),
        failure_config=FailureConfig(max_failures=max_failures, fail_fast=fail_fast),
        callbacks=callbacks,
        progress_reporter=progress_reporter,
        verbose=verbose,
        log_to_file=log_to_file,
    )
    tuner = _tuner(trainable, dict(config or {}), tune_config, run_config, resume)
    return _analysis(tuner.fit(), metric, mode, raise_on_failed_trial=raise_on_failed_trial)


def _tuner(
    trainable: Any, space: dict[str, Any], tune: TuneConfig, run: RunConfig, resume: bool | str | None
) -> Tuner:
    """What `resume` asks for."""
    plain = {None: "AUTO", True: "LOCAL", False: "NO"}
    said = resume if isinstance(resume, str) else plain.get(resume, "")
    kind, _, errored = said.partition("+")
    allowed = kind in ("AUTO", "LOCAL", "REMOTE", "NO") and errored in ("", "ERRORED", "RESTART_ERRORED")
    if not allowed:
        raise UsageError(
            f'resume is {resume!r}; expected None, True, False, "AUTO", "LOCAL" or "REMOTE", these three '
            'perhaps followed by "+ERRORED" or "+RESTART_ERRORED"'
        )
    path = address_of(run.storage_path, run.name) if run.name is not None else None
    there = path is not None and Tuner.can_restore(path)
    if kind == "NO" and there:
        raise ExperimentExistsError(
            f"{path} is there already, and resume is False. Give this experiment another name, or leave "
            "resume out to go on with that one"
        )
    if path is None or (kind in ("AUTO", "NO") and not errored) or (kind == "AUTO" and not there):
        return Tuner(trainable, param_space=space, tune_config=tune, run_config=run)
    return Tuner.restore(
        path,
        trainable,
        resume_errored=errored == "ERRORED",
        restart_errored=errored == "RESTART_ERRORED",
        param_space=space,
        tune_config=tune,
        run_config=run,
    )


def _analysis(
    grid: ResultGrid, metric: str | None, mode: str | None, *, raise_on_failed_trial: bool
) -> ExperimentAnalysis:
    if raise_on_failed_trial and grid.num_errors:
        names = "\n".join(str(error) for error in grid.errors[:5])
        raise TrialError(
            f"{grid.num_errors} of {len(grid)} trials of {grid.experiment_path} failed:\n{names}"
        )
    return ExperimentAnalysis(grid.history, default_metric=metric, default_mode=mode)
