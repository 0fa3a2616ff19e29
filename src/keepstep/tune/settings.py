"""What an experiment is told: by the names of `ray.tune`."""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from keepstep.errors import UsageError
from keepstep.tune.parts import check_kind, check_part

if TYPE_CHECKING:
    from keepstep.tune.callback import Callback
    from keepstep.tune.executors.protocol import Executor
    from keepstep.tune.reporting.base import ProgressReporter
    from keepstep.tune.schedulers.base import TrialScheduler
    from keepstep.tune.search.base import Searcher

__all__ = ["CheckpointConfig", "FailureConfig", "RunConfig", "TuneConfig", "check_mode"]


def check_mode(mode: object, name: str = "mode") -> None:
    """Refuse what is neither "min" nor "max".

    Raises:
        UsageError: it is something else than these or None.
    """
    if mode not in (None, "min", "max"):
        raise UsageError(f'{name} is {mode!r}; expected "min" or "max"')


def _check_count(name: str, value: object, *, least: int, none: str | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not whole and not (none is not None and value is None):
        otherwise = f", or None for {none}" if none is not None else ""
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}{otherwise}")


@dataclass
class CheckpointConfig:
    """Which checkpoints of a trial are made, and kept.

    Attributes:
        num_to_keep: that many of each trial; None: all. The newest, which a trial needs to go on, is always
            kept and counts.
        checkpoint_score_attribute: the metric that says which are best; nested ones by "a/b". None: the
            newest are.
        checkpoint_score_order: "max" or "min".
        checkpoint_frequency: a class saves after every so many iterations; 0: never by itself. Refused for
            functions, which report their own checkpoints.
        checkpoint_at_end: a class saves when its trial ends; None: yes. Refused for functions.
    """

    num_to_keep: int | None = None
    checkpoint_score_attribute: str | None = None
    checkpoint_score_order: Literal["max", "min"] = "max"
    checkpoint_frequency: int = 0
    checkpoint_at_end: bool | None = None

    def __post_init__(self) -> None:
        _check_count("CheckpointConfig.num_to_keep", self.num_to_keep, least=1, none="all")
        _check_count("CheckpointConfig.checkpoint_frequency", self.checkpoint_frequency, least=0)
        if self.checkpoint_score_order not in ("max", "min"):
            raise UsageError(
                f'CheckpointConfig.checkpoint_score_order is {self.checkpoint_score_order!r}; expected "max" '
                'or "min"'
            )


@dataclass
class FailureConfig:
    """What happens when a trial fails.

    Attributes:
        max_failures: how often a trial is started again from its last checkpoint; -1: always.
        fail_fast: True: the experiment ends with the first trial that failed for good, others are stopped
            after a checkpoint. "raise": and its error is raised by `fit`.
        max_silence_s: a trial that reports nothing for so long counts as failed, and its process is killed;
            None: it may take for ever.
    """

    max_failures: int = 0
    fail_fast: bool | Literal["raise"] = False
    max_silence_s: float | None = None

    def __post_init__(self) -> None:
        _check_count("FailureConfig.max_failures", self.max_failures, least=-1)
        if not (isinstance(self.fail_fast, bool) or self.fail_fast == "raise"):
            raise UsageError(
                f'FailureConfig.fail_fast is {self.fail_fast!r}; expected True, False or "raise"'
            )
        if self.fail_fast and self.max_failures != 0:
            raise UsageError(
                f"FailureConfig has max_failures={self.max_failures} and fail_fast={self.fail_fast!r}; with "
                "fail_fast nothing is tried again: leave max_failures at 0"
            )
        silence = self.max_silence_s
        if silence is not None and not (isinstance(silence, int | float) and 0 < silence < math.inf):
            raise UsageError(f"FailureConfig.max_silence_s is {silence!r}; expected seconds > 0, or None")


Stop = "Mapping[str, float] | Callable[[str, Mapping[str, Any]], bool] | Stopper | None"
"""What ends trials: {metric: value that ends a trial when reached}, a function of (trial_id, result), a
`Stopper`, or several of these in a list."""


@dataclass
class RunConfig:
    """Where an experiment lives, and what goes with it.

    Attributes:
        name: of its directory; None: made of the trainable's name and the time. The name of an experiment
            that is there already goes on with it if it is the same one, and is refused otherwise.
        storage_path: the directory, or the address in a bucket ("s3://bucket/runs"), that holds experiments;
            None: "~/keepstep_results".
        storage_options: for a bucket, as `keepstep.Store` takes them.
        stop: what ends trials: {metric: bound} (a trial ends with the first result that has reached one), a
            function (trial_id, result) -> bool, or a `Stopper`.
        checkpoint_config: which checkpoints are made and kept; None: all that are made.
        failure_config: what happens when a trial fails; None: it has failed.
        callbacks: told of everything.
        progress_reporter: who shows what goes on; None: a live table in a terminal, lines elsewhere.
        verbose: 0: silent; 1: progress; 2: and what the trials print.
        log_to_file: what a trial prints is always kept in its directory, in `stdout` and `stderr`; True: and
            nowhere else. A name, or two, replaces these names.
        byte_budget: most bytes that the checkpoints of all trials may take; the worst go first. None: any.
        env: environment variables for trials, or a function of a trial's config that gives them.
        executor: what runs trials: "local": processes of this machine; "inline": this process, one at a time,
            for debugging; "ray": a Ray cluster (needs `keepstep[ray]`); or an `Executor`'s maker, called
            with the trainable.
    """

    name: str | None = None
    storage_path: str | os.PathLike[str] | None = None
    storage_options: Mapping[str, Any] | None = None
    stop: Any = None
    checkpoint_config: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure_config: FailureConfig = field(default_factory=FailureConfig)
    callbacks: Sequence[Callback] | None = None
    progress_reporter: ProgressReporter | None = None
    verbose: int = 1
    log_to_file: bool | str | tuple[str, str] = False
    byte_budget: int | None = None
    env: Mapping[str, str] | Callable[[dict[str, Any]], Mapping[str, str]] | None = None
    executor: str | Callable[[Any], Executor] = "local"

    def __post_init__(self) -> None:
        check_kind("RunConfig.name", self.name, str, "a string")
        if self.name is not None and (not self.name or "/" in self.name or self.name in (".", "..")):
            raise UsageError(
                f"RunConfig.name is {self.name!r}; expected the name of a directory, without slashes. The "
                "directory above it is storage_path"
            )
        _check_count("RunConfig.byte_budget", self.byte_budget, least=1, none="no limit")
        where, place = (str, os.PathLike), "a directory, or an address in a bucket"
        check_kind("RunConfig.storage_path", self.storage_path, where, place)
        check_kind("RunConfig.verbose", self.verbose, int, "0, 1 or 2")
        check_kind("RunConfig.callbacks", self.callbacks, Sequence, "a list of callbacks")
        for callback in self.callbacks or ():
            check_part("one of RunConfig.callbacks", callback, "on_trial_result", "a tune.Callback")
        reporter = "a tune.ProgressReporter"
        check_part("RunConfig.progress_reporter", self.progress_reporter, "should_report", reporter)
        saves, fails = CheckpointConfig, FailureConfig
        said: tuple[Any, ...] = self.checkpoint_config, self.failure_config, self.verbose
        self.checkpoint_config = saves() if said[0] is None else said[0]  # None, as in Ray Tune
        self.failure_config = fails() if said[1] is None else said[1]
        self.verbose = 1 if said[2] is None else said[2]
        check_kind("RunConfig.checkpoint_config", self.checkpoint_config, saves, "a tune.CheckpointConfig")
        check_kind("RunConfig.failure_config", self.failure_config, fails, "a tune.FailureConfig")


@dataclass
class TuneConfig:
    """How configurations are chosen, and which trials go on.

    Attributes:
        mode: "min" or "max".
        metric: what counts; nested ones by "a/b".
        search_alg: who suggests configurations; None: grid and random search over `param_space`.
        scheduler: who decides which trials go on; None: all do.
        num_samples: how many configurations; times the size of the grid, if `param_space` has one. -1: until
            `time_budget_s` is over, or something stops it.
        max_concurrent_trials: most trials at a time; None: as many as resources allow.
        time_budget_s: seconds (or a timedelta) after which running trials are stopped after a checkpoint and
            no other starts. Time before a restart counts.
        reuse_actors: a class with `reset_config` goes on in the same process with the next trial; None: no.
        trial_name_creator: the name of a trial, from the trial.
        trial_dirname_creator: the name of its directory, from the trial.
        seed: of everything drawn at random; None: one is drawn and written down, so that a restart goes on
            with the same.
    """

    mode: Literal["min", "max"] | None = None
    metric: str | None = None
    search_alg: Searcher | str | None = None
    scheduler: TrialScheduler | str | None = None
    num_samples: int = 1
    max_concurrent_trials: int | None = None
    time_budget_s: float | dt.timedelta | None = None
    reuse_actors: bool | None = None
    trial_name_creator: Callable[[Any], str] | None = None
    trial_dirname_creator: Callable[[Any], str] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode, "TuneConfig.mode")
        _check_count("TuneConfig.num_samples", self.num_samples, least=-1)
        if self.num_samples == 0:
            raise UsageError("TuneConfig.num_samples is 0; expected at least 1, or -1 for no end")
        most = "TuneConfig.max_concurrent_trials"
        _check_count(most, self.max_concurrent_trials, least=1, none="no limit")
        check_kind("TuneConfig.metric", self.metric, str, "the name of a metric")
        if not isinstance(self.scheduler, str):
            one = "a scheduler, or the name of one"
            check_part("TuneConfig.scheduler", self.scheduler, "choose_trial_to_run", one)
        if not isinstance(self.search_alg, str):
            one = "a searcher, or the name of one"
            check_part("TuneConfig.search_alg", self.search_alg, "suggest", one)
        seconds = "seconds, or a timedelta"
        check_kind("TuneConfig.time_budget_s", self.time_budget_s, (int, float, dt.timedelta), seconds)
        if self.budget_s is not None and not self.budget_s > 0:
            raise UsageError(f"TuneConfig.time_budget_s is {self.time_budget_s!r}; expected more than 0")

    @property
    def budget_s(self) -> float | None:
        """`time_budget_s` in seconds."""
        budget = self.time_budget_s
        return budget.total_seconds() if isinstance(budget, dt.timedelta) else budget
