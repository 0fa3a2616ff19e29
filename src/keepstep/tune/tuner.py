"""`Tuner`: an experiment of many trials, which goes on where it stood."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from keepstep.errors import ExperimentNotFoundError, UsageError
from keepstep.tune.assembly.environment import note_unneeded
from keepstep.tune.assembly.opening import address_of, free_name, open_experiment
from keepstep.tune.assembly.running import Plan, Resume, carry_out
from keepstep.tune.assembly.spec import newest_spec, revive
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.reading import Looked, look_at, read_experiment, whole_address
from keepstep.tune.experiment.records import ExperimentMade
from keepstep.tune.registry import named_trainable
from keepstep.tune.results import ResultGrid, error_of
from keepstep.tune.search.description import revived
from keepstep.tune.settings import RunConfig, TuneConfig
from keepstep.tune.trainable.kinds import check_trainable, is_class_trainable, trainable_name

__all__ = ["Tuner"]


class Tuner:
    """Runs trials of a function or class over a search space.

    An experiment of the same name that is there already goes on if it is this one: finished trials are not
    run again, others go on from their last checkpoint. So a script that was killed is started again as it is.

    Args:
        trainable: a function of a configuration, a subclass of `Trainable`, or the name that one of these was
            registered by.
        param_space: the configuration: values, and what they are drawn from, nested.
        tune_config: how configurations are chosen, and which trials go on.
        run_config: where the experiment lives, and what goes with it.

    Raises:
        UsageError: something of it can't work.
    """

    def __init__(
        self,
        trainable: str | Callable[[dict[str, Any]], Any] | type,
        *,
        param_space: Mapping[str, Any] | None = None,
        tune_config: TuneConfig | None = None,
        run_config: RunConfig | None = None,
    ) -> None:
        trainable = named_trainable(trainable)
        check_trainable(trainable)
        self._trainable = trainable
        self._param_space = dict(param_space or {})
        self._tune = tune_config if tune_config is not None else TuneConfig()
        self._run = run_config if run_config is not None else RunConfig()
        self._resume = Resume()
        self._looked: Looked | None = None
        self._address: str | None = None
        _check_checkpoints(trainable, self._run)
        note_unneeded()

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        trainable: str | Callable[[dict[str, Any]], Any] | type,
        resume_unfinished: bool = True,
        resume_errored: bool = False,
        restart_errored: bool = False,
        param_space: Mapping[str, Any] | None = None,
        *,
        tune_config: TuneConfig | None = None,
        run_config: RunConfig | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Tuner:
        """An experiment that was started before, to go on by `fit`.

        Args:
            path: the address of its directory: `<storage_path>/<name>`.
            trainable: the same function or class; nothing pickled is kept of it.
            resume_unfinished: trials that were neither done nor failed go on.
            resume_errored: those that failed go on from their last checkpoints.
            restart_errored: those that failed begin anew.
            param_space: the same as it was; needed if it holds functions or objects.
            tune_config: the same as it was, up to what does not decide (`max_concurrent_trials`,
                `time_budget_s`, more `num_samples`); None: from the journal. Needed if a scheduler or
                searcher is not keepstep's own.
            run_config: stop, callbacks, checkpoint and failure configuration; None: from the journal, without
                callbacks. Its name and storage_path are not looked at.
            storage_options: for a bucket; None: those of `run_config`.

        Raises:
            ExperimentNotFoundError: there is none at that path.
            JournalError: its journal is damaged.
            UsageError: something has to be handed over, and was not.
        """
        if resume_errored and restart_errored:
            raise UsageError(
                "Tuner.restore was given resume_errored=True and restart_errored=True; trials that failed "
                "either go on or begin anew: choose one"
            )
        address = whole_address(path)
        if storage_options is None and run_config is not None:
            storage_options = run_config.storage_options
        looked = look_at(address, storage_options)
        records = looked.told.records
        made = records[0] if records else None
        if not isinstance(made, ExperimentMade):
            raise ExperimentNotFoundError(
                f"{address} holds an experiment that was never begun; start it anew"
            )
        spec = newest_spec(records)
        tune, run = revive(spec, tune_config, run_config)
        space = param_space if param_space is not None else revived(spec["param_space"])
        run = replace(run, storage_options=storage_options)
        tuner = cls(trainable, param_space=space, tune_config=tune, run_config=run)
        tuner._address, tuner._looked = address, looked
        tuner._resume = Resume(
            unfinished=resume_unfinished,
            errored="go on" if resume_errored else "anew" if restart_errored else None,
            restored=True,
        )
        return tuner

    @classmethod
    def can_restore(
        cls, path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether there is an experiment at this path."""
        try:
            return bool(read_experiment(whole_address(path), storage_options))
        except ExperimentNotFoundError:
            return False

    def fit(self) -> ResultGrid:
        """Run the experiment until there is nothing left to do.

        Ctrl-C once: trials save a checkpoint and stop, and `fit` returns what there is. Twice: they stop at
        once. Either way it goes on when it is started again.

        Raises:
            ExperimentExistsError: another experiment has its name; nothing of that was touched.
            ExperimentBusyError: another process runs it.
            TrialError: a trial failed, and `FailureConfig.fail_fast` is "raise".
            StoreError: the place refuses.
            TuneError: a scheduler or searcher does what can't be.
        """
        address, name = self._place()
        looked, self._looked = self._looked, None
        opened = open_experiment(address, self._run.storage_options, looked=looked)
        plan = Plan(
            trainable=self._trainable,
            param_space=self._param_space,
            tune=self._tune,
            run=self._run,
            name=name,
            resume=self._resume,
        )
        history = carry_out(plan, opened)
        self._raise_failure(history)
        return ResultGrid(
            history, metric=self._tune.metric, mode=self._tune.mode, storage_options=self._run.storage_options
        )

    def get_results(self) -> ResultGrid:
        """What the experiment has so far, without running anything.

        Raises:
            ExperimentNotFoundError: it was not begun.
        """
        address, _ = self._place()
        records = read_experiment(address, self._run.storage_options)
        return ResultGrid(
            History.of(records, address),
            metric=self._tune.metric,
            mode=self._tune.mode,
            storage_options=self._run.storage_options,
        )

    def _place(self) -> tuple[str, str]:
        if self._address is None:
            path, given = self._run.storage_path, self._run.name
            name = given or free_name(path, trainable_name(self._trainable), self._run.storage_options)
            self._address = address_of(path, name)
        return self._address, self._address.rstrip("/").rpartition("/")[2]

    def _raise_failure(self, history: History) -> None:
        if self._run.failure_config.fail_fast != "raise":
            return
        for trial in history.all:
            if trial.error is not None and trial.is_finished():
                raise error_of(trial)


def _check_checkpoints(trainable: Any, run: RunConfig) -> None:
    """A function saves when it wants to; telling it when is a mistake.

    Raises:
        UsageError: it is told.
    """
    config = run.checkpoint_config
    if is_class_trainable(trainable):
        return
    for name, said in (
        ("checkpoint_frequency", config.checkpoint_frequency),
        ("checkpoint_at_end", config.checkpoint_at_end),
    ):
        if said:
            raise UsageError(
                f"CheckpointConfig({name}={said!r}) is for classes; {trainable_name(trainable)} is a "
                "function, whose training loop keepstep can't look into. Save from inside it: "
                "tune.report(metrics, checkpoint=...) as often, or as late, as you want"
            )
