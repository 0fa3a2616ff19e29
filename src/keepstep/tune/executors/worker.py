"""Runs a job: calls the trial's code, tells the driver, does what it orders.

The same in a process, in a thread and in an actor: what differs is the `Channel` and the `Place`.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from keepstep.errors import UsageError
from keepstep.tune.executors.channel import Channel, Place
from keepstep.tune.executors.protocol import (
    Ended,
    Failed,
    Go,
    Job,
    Next,
    Order,
    Reported,
    Saved,
    SavedCheckpoint,
    Started,
    Stop,
)
from keepstep.tune.result import AUTOMATIC_FIELDS, DONE, SHOULD_CHECKPOINT, TIME_THIS_ITER_S
from keepstep.tune.trainable.bundles import resource_dict_to_pg_factory
from keepstep.tune.trainable.function import call_function
from keepstep.tune.trainable.kinds import is_class_trainable, saves_checkpoints
from keepstep.tune.trainable.metrics import as_metrics, plain_metrics
from keepstep.tune.trainable.savers import commit, load, make_saver, open_checkpoint
from keepstep.tune.trainable.session import Session, TrialStopped, enter
from keepstep.tune.trainable.trainable import Trainable

if TYPE_CHECKING:
    from keepstep.tune.checkpoint import Checkpoint
    from keepstep.tune.saving import Saver

__all__ = ["describe", "run_job"]

_HOST = socket.gethostname()
_FILLED_IN = frozenset({*AUTOMATIC_FIELDS, "config"})


def run_job(job: Job, trainable: Any, channel: Channel, place: Place) -> None:
    """Run a trial, and those that follow it in this process, to the end.

    Whatever its code raises becomes a `Failed`; nothing is raised here.

    Args:
        job: the trial.
        trainable: a function or class, as the user gave it.
        channel: to the driver.
        place: where it runs.
    """
    process = _Process(job, channel, place)
    last: Ended | Failed | None = None
    try:
        place.enter(job)
        start = _Start(job, process)
        enter(start.session)
        channel.send(Started(run=job.run, pid=place.pid, host=_HOST))
        if is_class_trainable(trainable):
            _ClassTrial(trainable, start).run()
        else:
            call_function(trainable, job.config, start.told_by_function)
    except TrialStopped:
        pass
    except BaseException as error:  # noqa: BLE001 - SystemExit and Ctrl-C in a trial are its failure
        last = describe(process.job.run, error)
    enter(None)
    channel.send(last or Ended(run=process.job.run))


def describe(run: str, error: BaseException) -> Failed:
    """An exception of a trial's code, in words."""
    try:
        said = str(error)
    except Exception as worse:  # noqa: BLE001 - it is the user's class
        said = f"(its message could not be made: {type(worse).__name__})"
    kind = type(error).__qualname__
    try:
        text = "".join(traceback.format_exception(type(error), error, _of_the_user(error)))
    except Exception:  # noqa: BLE001 - the same
        text = "".join(traceback.format_tb(error.__traceback__)) + f"{kind}: {said}\n"
    lines = said.splitlines()
    return Failed(run=run, error=f"{kind}: {lines[0]}" if lines else kind, traceback=text)


def _of_the_user(error: BaseException) -> Any:
    """The traceback without the frames at its top that are not the trial's code."""
    found = error.__traceback__
    ours = (__package__, "keepstep.tune.trainable")
    while found is not None and found.tb_next and found.tb_frame.f_globals.get("__package__") in ours:
        found = found.tb_next
    return found


class _Process:
    """What the trials that run here one after another have in common."""

    def __init__(self, job: Job, channel: Channel, place: Place) -> None:
        self.job = job
        self.channel = channel
        self.place = place

    def follow(self, job: Job) -> None:
        """One trial is over, and this one runs."""
        self.channel.send(Ended(run=self.job.run))
        self.channel.send(Started(run=job.run, pid=self.place.pid, host=_HOST))
        self.job = job


class _Start:
    """One start of a trial: counts its results, saves its checkpoints, waits for orders."""

    def __init__(self, job: Job, process: _Process) -> None:
        self.job = job
        self.process = process
        self.iteration = job.iteration
        self._saver: Saver | None = None
        self._since = time.perf_counter()
        self._stopped = False
        self._reporting = threading.Lock()
        self.session = Session(
            trial_id=job.trial_id,
            trial_name=job.trial_name,
            experiment_name=job.experiment,
            working_dir=process.place.working_dir,
            resources=resource_dict_to_pg_factory(job.resources),
            pid=process.place.pid,
            report=self.function_report,
            checkpoint=self.checkpoint,
        )

    @property
    def saver(self) -> Saver:
        """Commits this start's checkpoints; made when the first is saved."""
        if self._saver is None:
            self._saver = make_saver(
                self.job.path,
                storage_options=self.job.storage_options,
                lineage=self.job.lineage,
                next_checkpoint=self.job.next_checkpoint,
                resumed_from=self.job.checkpoint,
            )
        return self._saver

    def checkpoint(self) -> Checkpoint | None:
        """What to go on from."""
        if self.job.checkpoint is None:
            return None
        return open_checkpoint(self.job.checkpoint, storage_options=self.job.storage_options)

    def report(
        self,
        metrics: dict[str, Any],
        left_out: dict[str, str],
        checkpoint: SavedCheckpoint | None,
        took_s: float | None = None,
    ) -> Order:
        """Tell a result and wait for the order."""
        event = Reported(
            run=self.job.run,
            iteration=self.iteration,
            time_this_iter_s=time.perf_counter() - self._since if took_s is None else took_s,
            metrics=metrics,
            left_out=left_out,
            checkpoint=checkpoint,
        )
        return self._ask(event)

    def saved(self, checkpoint: SavedCheckpoint | None) -> Order:
        """Tell that what was asked for is saved, and wait for the order."""
        return self._ask(Saved(run=self.job.run, iteration=self.iteration, checkpoint=checkpoint))

    def _ask(self, event: Reported | Saved) -> Order:
        self.process.channel.send(event)
        order = self.process.channel.receive()
        self._since = time.perf_counter()
        return order

    def function_report(self, said: Any, checkpoint: Any, by: str) -> None:
        """`tune.report`: returns if the function may go on, else unwinds it. Threads report in turn."""
        with self._reporting:
            self._report_in_turn(said, checkpoint, by)

    def _report_in_turn(self, said: Any, checkpoint: Any, by: str) -> None:
        if self._stopped:
            raise TrialStopped  # its code caught the first one
        metrics, left_out = plain_metrics(as_metrics(said, by))
        saved = None
        if checkpoint is not None:
            done = self.saver.save(checkpoint, iteration=self.iteration + 1, metrics=metrics)
            saved = SavedCheckpoint(name=done.name, bytes=done.bytes)
        self.iteration += 1
        order = self.report(metrics, left_out, saved)
        ends = bool(metrics.get(DONE)) or not isinstance(order, Go)
        while order.save:  # a function alone knows what to save
            order = self.saved(None)
            ends = ends or not isinstance(order, Go)
        if ends:
            self._stopped = True
            raise TrialStopped

    def told_by_function(self, said: Any, by: str) -> None:
        """A function yielded or returned a result."""
        self.function_report(said, None, by)


class _ClassTrial:
    """A class that is trained, saved and ended as the driver orders."""

    def __init__(self, kind: type[Trainable], start: _Start) -> None:
        self._kind = kind
        self._start = start
        self._saves = saves_checkpoints(kind)
        self._metrics: dict[str, Any] = {}

    def run(self) -> None:
        """To the end of the last trial."""
        self._trainable = self._kind(self._start.job.config)
        try:
            self._load()
            order: Order = Go()
            while True:
                while isinstance(order, Go):
                    order = self._saving(self._train())
                if isinstance(order, Stop) or not self._become(order.job):
                    break
                order = Go()
        except BaseException:
            self._clean_up_quietly()
            raise
        self._trainable.stop()

    def _load(self) -> None:
        job = self._start.job
        checkpoint = self._start.checkpoint()
        if checkpoint is not None:
            load(self._trainable, checkpoint)
        self._trainable._resume_at(job.iteration, job.time_total_s)

    def _train(self) -> Order:
        start = self._start
        result = self._trainable.train()
        start.iteration = self._trainable.training_iteration
        said = {name: value for name, value in result.items() if name not in _FILLED_IN}
        if result.get(DONE):
            said[DONE] = True
        self._metrics, left_out = plain_metrics(as_metrics(said, f"{self._kind.__name__}.step()"))
        due = start.job.checkpoint_frequency > 0 and start.iteration % start.job.checkpoint_frequency == 0
        saved = None
        if due or self._metrics.get(SHOULD_CHECKPOINT):
            saved = self._save("checkpoint_frequency" if due else f"{SHOULD_CHECKPOINT} in a result")
        order = start.report(self._metrics, left_out, saved, result.get(TIME_THIS_ITER_S))
        return Stop(save=order.save) if result.get(DONE) and isinstance(order, Go) else order

    def _save(self, asked_by: str) -> SavedCheckpoint:
        if not self._saves:
            raise UsageError(
                f"{asked_by} asks for a checkpoint, but {self._kind.__name__} has no save_checkpoint(); "
                "override it, and load_checkpoint()"
            )
        saved = commit(self._trainable, self._start.saver, self._metrics)
        return SavedCheckpoint(name=saved.name, bytes=saved.bytes)

    def _saving(self, order: Order) -> Order:
        """Save as long as that is asked for; returns what is to follow."""
        final: Stop | Next | None = None
        while True:
            if not isinstance(order, Go):
                final = order
            if not order.save:
                return final or order
            order = self._start.saved(self._save("the driver") if self._saves else None)

    def _become(self, job: Job) -> bool:
        """Go on as another trial, if the class can."""
        if self._kind.reset_config is Trainable.reset_config:
            return False
        old, process = self._start, self._start.process
        process.place.enter(job)
        self._start = _Start(job, process)
        enter(self._start.session)
        moved = None
        try:
            moved = self._trainable.reset(job.config)
        finally:
            if moved is not False:
                process.follow(job)  # what reset_config raises is the new trial's failure
        if moved:
            self._load()
            return True
        self._start = old
        process.place.enter(old.job)
        enter(old.session)
        return False

    def _clean_up_quietly(self) -> None:
        try:
            self._trainable.stop()
        except Exception:  # noqa: BLE001 - the first error is the one to tell
            traceback.print_exc(file=sys.stderr)
