"""An experiment is started, or goes on: its parts are made, its journal is read, its driver runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from keepstep.checkpoint.place.registry import is_address
from keepstep.errors import ExperimentExistsError, UsageError
from keepstep.tune.assembly.opening import Opened
from keepstep.tune.assembly.spec import check_same, newest_spec, spec_of
from keepstep.tune.callback import Callback
from keepstep.tune.driver.audience import Audience
from keepstep.tune.driver.deciding import Decider
from keepstep.tune.driver.driver import Driver
from keepstep.tune.driver.halting import Halt
from keepstep.tune.driver.interrupts import Interrupts
from keepstep.tune.driver.keeper import Keeper
from keepstep.tune.driver.making import Maker, Naming
from keepstep.tune.driver.options import Options
from keepstep.tune.driver.replay import replay
from keepstep.tune.driver.showing import Showing
from keepstep.tune.executors.protocol import Executor
from keepstep.tune.executors.registry import make_executor
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import (
    DriverStarted,
    ExperimentMade,
    Record,
    ResultReported,
    TrialAgain,
    TrialEnded,
    now,
)
from keepstep.tune.experiment.trial import ERROR, Trial
from keepstep.tune.logger.callback import FilesCallback
from keepstep.tune.logger.files import TrialFiles
from keepstep.tune.reporting.choosing import make_reporter
from keepstep.tune.reporting.echoing import EchoCallback
from keepstep.tune.schedulers.base import FIFOScheduler, TrialScheduler
from keepstep.tune.schedulers.registry import create_scheduler
from keepstep.tune.search.base import Searcher
from keepstep.tune.search.basic_variant import BasicVariantGenerator
from keepstep.tune.search.create import create_searcher
from keepstep.tune.settings import RunConfig, TuneConfig
from keepstep.tune.stopper import make_stopper
from keepstep.tune.trainable.kinds import is_class_trainable, saves_checkpoints, trainable_name
from keepstep.tune.trainable.resources import asks_alike, resources_of

__all__ = ["Plan", "Resume", "carry_out"]


_UNSYNCED_S: Final = 60.0
"""The system writes what is in its memory to the disk before so many seconds are over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """What is run again of an experiment that is there.

    Attributes:
        unfinished: trials that were neither done nor failed go on.
        errored: "go on" from their last checkpoint, "anew", or None: not again.
        restored: whether that experiment was asked for by its path, and not by its name and everything else.
    """

    unfinished: bool = True
    errored: Literal["go on", "anew"] | None = None
    restored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything the user said.

    Attributes:
        trainable: the function or class.
        param_space: the search space.
        tune: how configurations are chosen.
        run: where the experiment lives, and what goes with it.
        name: of the experiment.
        resume: what is run again if it is there.
    """

    trainable: Any
    param_space: Mapping[str, Any]
    tune: TuneConfig
    run: RunConfig
    name: str
    resume: Resume


def carry_out(plan: Plan, opened: Opened) -> History:
    """Run an experiment until there is nothing left to do, or to be done.

    Args:
        plan: what the user said.
        opened: the experiment; released on return.

    Returns:
        How it stands then.

    Raises:
        SystemExit: SIGTERM came; everything was saved.
        ExperimentExistsError: another one is there.
        UsageError: something can't work.
        TuneError, StoreError: see `Driver`.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(opened.release)
        spec = spec_of(plan.param_space, plan.tune, plan.run)
        history, decider = _brought_up(plan, opened, spec)
        interrupts = stack.enter_context(Interrupts())
        executor = make_executor(plan.run.executor, plan.trainable)
        stack.callback(executor.close)
        showing = _showing(plan, history, decider, executor)
        stack.callback(showing.close)
        _note_mode(plan.tune, showing)
        audience = _audience(plan, opened, history, decider, stack)
        keeper = Keeper(
            history,
            opened.journal,
            rules=plan.run.checkpoint_config,
            byte_budget=plan.run.byte_budget,
            storage_options=plan.run.storage_options,
            say=showing.say,
        )
        keeper.clear_up()
        driver = Driver(
            history=history,
            journal=opened.journal,
            decider=decider,
            maker=_maker(plan, history),
            executor=executor,
            audience=audience,
            showing=showing,
            keeper=keeper,
            halt=Halt(interrupts, plan.tune.budget_s),
            options=_options(plan, decider.searcher),
        )
        driver.run()
        audience.ended()
    if interrupts.noted == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    return history


def _showing(plan: Plan, history: History, decider: Decider, executor: Executor) -> Showing:
    silent = plan.run.verbose <= 0 and plan.run.progress_reporter is None
    reporter = None if silent else make_reporter(plan.run.verbose, plan.run.progress_reporter)
    return Showing(
        reporter,
        history=history,
        executor=executor,
        decider=decider,
        metric=plan.tune.metric,
        mode=plan.tune.mode,
    )


def _note_mode(tune: TuneConfig, showing: Showing) -> None:
    if tune.metric is not None and tune.mode is None:
        showing.say(
            f"TuneConfig has metric={tune.metric!r} and no mode, so nobody knows which trial is best: add "
            'mode="min" or mode="max", or say it to get_best_result'
        )


def _audience(
    plan: Plan, opened: Opened, history: History, decider: Decider, stack: contextlib.ExitStack
) -> Audience:
    """The user's callbacks, and behind them the files of trials, so that what they change is in these."""
    files = TrialFiles(opened.address, plan.run.storage_options)
    stack.callback(files.close)
    _rebuild(files, opened.records, history)
    callbacks: list[Callback] = [*(plan.run.callbacks or ())]
    if plan.run.verbose >= 2 and not plan.run.log_to_file and not is_address(opened.address):
        callbacks.append(EchoCallback(_outputs(plan.run.log_to_file)))
    audience = Audience(history, [*callbacks, FilesCallback(files)], plan.run.storage_options)
    audience.setup(plan.run.stop, plan.tune.num_samples, decider.searcher.total_samples)
    return audience


def _rebuild(files: TrialFiles, records: Sequence[Record], history: History) -> None:
    """Make the files of trials agree with the journal: of those that may go on, and of those that ended last.

    Files are not synced: what was written to them just before a power cut may be gone.
    """
    first, *others = records or [history.made]
    assert isinstance(first, ExperimentMade)
    since = max((record.time for record in others), default=0.0) - _UNSYNCED_S
    results: dict[str, list[dict[str, Any]]] = {}
    recent = {id_ for id_, trial in history.live.items() if trial.starts}
    recent |= {
        record.trial for record in others if isinstance(record, ResultReported) and record.time > since
    }
    again = History(first, history.path)
    for record in others if recent else ():
        again.apply(record)
        if isinstance(record, ResultReported) and record.trial in recent:
            results.setdefault(record.trial, []).append(again.result_of(record))
    for trial_id in sorted(recent):
        files.rebuild(history.trial(trial_id), results.get(trial_id, []))


def _brought_up(plan: Plan, opened: Opened, spec: Mapping[str, Any]) -> tuple[History, Decider]:
    """The experiment as its journal says; a new one gets its first record."""
    if not opened.records:
        made = ExperimentMade(
            time=now(),
            id=secrets.token_hex(8),
            name=plan.name,
            trainable=trainable_name(plan.trainable),
            seed=plan.tune.seed if plan.tune.seed is not None else secrets.randbits(31),
            spec=spec,
        )
        opened.journal.add(made)
    else:
        first = opened.records[0]
        assert isinstance(first, ExperimentMade)
        made = first
        if not plan.resume.restored:
            _check_trainable(made, plan, opened.address)
            check_same(newest_spec(opened.records), spec, opened.address)
    history = History(made, opened.address)
    decider = _decider(plan, history)
    replay(opened.records[1:], history, decider)
    decider.messages()  # they were told when they were new
    changed = spec if opened.records and newest_spec(opened.records) != spec else None
    started = DriverStarted(time=now(), host=socket.gethostname(), pid=os.getpid(), spec=changed)
    opened.journal.add(started)
    history.apply(started)
    _run_again(plan.resume, history, decider, opened)
    return history, decider


def _check_trainable(made: ExperimentMade, plan: Plan, address: str) -> None:
    name = trainable_name(plan.trainable)
    if made.trainable != name:
        raise ExperimentExistsError(
            f"{address} holds an experiment of {made.trainable!r}, and this one is of {name!r}. Nothing was "
            "changed. Give this one another RunConfig.name, or go on with that one by Tuner.restore"
        )


def _run_again(resume: Resume, history: History, decider: Decider, opened: Opened) -> None:
    for trial in list(history.live.values()) if not resume.unfinished else []:
        _end(trial, history, decider, opened)
    for trial in list(history.all) if resume.errored is not None else []:
        if trial.status == ERROR:
            again = TrialAgain(time=now(), trial=trial.trial_id, anew=resume.errored == "anew")
            opened.journal.add(again)
            history.apply(again)
            decider.again(trial)


def _end(trial: Trial, history: History, decider: Decider, opened: Opened) -> None:
    again = trial.ends_at is not None
    draft = TrialEnded(time=now(), trial=trial.trial_id, why="left")
    history.completed(draft, acted=True)
    opened.journal.add(replace(draft, acts=decider.completed(trial, again=again)))


def _decider(plan: Plan, history: History) -> Decider:
    tune = plan.tune
    searcher, scheduler = _searcher(tune), _scheduler(tune)
    if scheduler.whole_population and tune.num_samples < 0:
        raise UsageError(
            f"{type(scheduler).__name__} compares trials that take turns, so all of them are made before the "
            "first one starts, and TuneConfig.num_samples=-1 is without end: say how many there are to be"
        )
    searcher.set_seed(history.made.seed)
    scheduler.set_seed(history.made.seed)
    searcher.set_search_properties(tune.metric, tune.mode, plan.param_space, num_samples=tune.num_samples)
    saves = is_class_trainable(plan.trainable)
    scheduler.set_search_properties(tune.metric, tune.mode, {}, saves_when_asked=saves)
    stopper, space = make_stopper(plan.run.stop), plan.param_space
    return Decider(history, searcher=searcher, scheduler=scheduler, stopper=stopper, param_space=space)


def _searcher(tune: TuneConfig) -> Searcher:
    if tune.search_alg is None:
        return BasicVariantGenerator()
    return create_searcher(tune.search_alg) if isinstance(tune.search_alg, str) else tune.search_alg


def _scheduler(tune: TuneConfig) -> TrialScheduler:
    if tune.scheduler is None:
        return FIFOScheduler()
    return create_scheduler(tune.scheduler) if isinstance(tune.scheduler, str) else tune.scheduler.anew()


def _options(plan: Plan, searcher: Searcher) -> Options:
    tune, run = plan.tune, plan.run
    is_class = is_class_trainable(plan.trainable)
    return Options(
        is_class=is_class,
        resources_alike=asks_alike(plan.trainable),
        saves=saves_checkpoints(plan.trainable),
        reuse=is_class and bool(tune.reuse_actors),
        num_samples=None if searcher.counts_samples or tune.num_samples < 0 else tune.num_samples,
        max_concurrent=tune.max_concurrent_trials,
        time_budget_s=tune.budget_s,
        checkpoints=run.checkpoint_config,
        failures=run.failure_config,
        storage_options=run.storage_options,
        env=_environment(run),
        outputs=_outputs(run.log_to_file),
    )


def _environment(run: RunConfig) -> Callable[[dict[str, Any]], Mapping[str, str]]:
    said = run.env
    if callable(said):
        return said
    return lambda config: said or {}  # noqa: ARG005


def _outputs(log_to_file: bool | str | tuple[str, str]) -> tuple[str, str]:
    if isinstance(log_to_file, bool) or log_to_file is None:
        return "stdout", "stderr"
    said: Any = log_to_file
    names = (said, said) if isinstance(said, str) else tuple(said if isinstance(said, list | tuple) else ())
    if len(names) != 2 or not all(isinstance(name, str) and name and "/" not in name for name in names):
        raise UsageError(
            f"RunConfig.log_to_file is {log_to_file!r}; expected True, False, the name of a file, or two "
            "names: for what a trial prints, and for its errors"
        )
    return names[0], names[1]


def _maker(plan: Plan, history: History) -> Maker:
    return Maker(
        history,
        resources=lambda config: resources_of(plan.trainable, config),
        naming=Naming(name=plan.tune.trial_name_creator, dirname=plan.tune.trial_dirname_creator),
    )
