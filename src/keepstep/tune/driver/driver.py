"""The driver of an experiment: one thread, one turn after the other.

A turn: take the executor's news; decide; write all of it into the journal, durably; only then answer the
trials that wait, start others, and delete what is not kept. So whatever a kill leaves undone, nothing was
done that the journal does not know.
"""

from __future__ import annotations

import time
from dataclasses import replace

from keepstep.tune.driver.audience import Audience
from keepstep.tune.driver.deciding import Decider, Verdict
from keepstep.tune.driver.halting import Halt
from keepstep.tune.driver.keeper import Keeper
from keepstep.tune.driver.ledger import Ledger
from keepstep.tune.driver.making import Maker
from keepstep.tune.driver.options import Options
from keepstep.tune.driver.runs import Run, job_of
from keepstep.tune.driver.showing import Showing
from keepstep.tune.driver.starting import Starter
from keepstep.tune.executors.protocol import (
    Ended,
    Event,
    Executor,
    Failed,
    Go,
    Next,
    Order,
    Reported,
    Saved,
    Started,
    Stop,
)
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import Journal
from keepstep.tune.experiment.records import ResultReported, now
from keepstep.tune.experiment.trial import RUNNING, Trial
from keepstep.tune.result import AUTOMATIC_FIELDS, DONE, SHOULD_CHECKPOINT

__all__ = ["Driver"]

_TURN_S = 0.5
"""How long a turn waits for news before it looks whether time is over, or somebody silent for too long."""


class Driver:
    """Runs an experiment to its end.

    Args:
        history: how it stands.
        journal: what it writes down.
        decider: who decides.
        maker: of trials.
        executor: what runs trials.
        audience: who is told.
        showing: what people see.
        keeper: which checkpoints stay.
        halt: why it may end before all is done.
        options: what the user said.
    """

    def __init__(
        self,
        *,
        history: History,
        journal: Journal,
        decider: Decider,
        maker: Maker,
        executor: Executor,
        audience: Audience,
        showing: Showing,
        keeper: Keeper,
        halt: Halt,
        options: Options,
    ) -> None:
        self._history = history
        self._journal = journal
        self._decider = decider
        self._ledger = Ledger(
            history=history,
            journal=journal,
            decider=decider,
            audience=audience,
            show_end=showing.ended,
            keeper=keeper,
            halt=halt,
            failures=options.failures,
        )
        self._starter = Starter(history, journal, decider, maker, executor, options, self._ledger.refused)
        self._executor = executor
        self._audience = audience
        self._showing = showing
        self._keeper = keeper
        self._halt = halt
        self._options = options
        self._runs: dict[str, Run] = {}
        self._answers: list[tuple[Run, Order]] = []

    def run(self) -> str:
        """Run until there is nothing left to do, or to be done.

        Returns:
            Why it ended, as `ExperimentEnded` has it.
        """
        self._showing.begin()
        while True:
            self._audience.turn_begins()
            self._watch()
            self._start_trials()
            self._end_stopped()
            self._settle()
            if not self._runs:
                break
            for event in self._executor.wait(_TURN_S):
                self._take(event)
                self._end_stopped()
            self._audience.turn_ends()
            self._showing.look()
        why = self._halt.reason or "all"
        self._ledger.all_over(why)
        self._settle()
        self._audience.turn_ends()
        self._showing.end()
        return why

    # ---------------------------------------------------------------------------------- starting

    def _start_trials(self) -> None:
        while self._halt.reason is None and self._room():
            trial = self._starter.next_trial()
            if trial is None or self._still_ends(trial):
                return
            if not self._executor.fits(trial.resources):
                if not self._runs:
                    raise self._starter.no_room(trial)
                return
            self._launch(trial)

    def _room(self) -> bool:
        most = self._options.max_concurrent
        return most is None or len(self._runs) < most

    def _still_ends(self, trial: Trial) -> bool:
        """Whether its last start is not over yet."""
        return any(run.trial is trial for run in self._runs.values())

    def _launch(self, trial: Trial) -> None:
        run = self._new_run(trial)
        self._settle()
        self._audience.started(trial, restored=run.job.checkpoint is not None)
        self._executor.launch(run.job)

    def _new_run(self, trial: Trial) -> Run:
        job = job_of(self._history, trial, self._options)
        run = Run(job=job, trial=trial, total_s=job.time_total_s)
        self._runs[run.id] = run
        self._ledger.launched(trial)
        return run

    # -------------------------------------------------------------------------------------- news

    def _take(self, event: Event) -> None:
        run = self._runs.get(event.run)
        if run is None:  # killed, or replaced by the next in its process
            if isinstance(event, Ended | Failed):
                self._launch_replacement(event.run)
            return
        run.heard_s = time.monotonic()
        match event:
            case Started():
                if not run.over:
                    self._ledger.started(run.trial, event)
            case Reported():
                self._reported(run, event)
            case Saved():
                self._saved(run, event)
            case Ended():
                self._ended(run)
            case Failed():
                self._failed(run, event)

    def _reported(self, run: Run, event: Reported) -> None:
        run.total_s += event.time_this_iter_s
        run.since += 1
        if run.over:
            self._answer(run, Stop())
        elif event.iteration <= run.trial.iteration:
            self._reported_again(run, event)
        else:
            self._resulted(run, event)

    def _reported_again(self, run: Run, event: Reported) -> None:
        """What the journal has already: a kill had taken the training behind it."""
        if event.checkpoint is not None:
            self._ledger.saved(run.trial, event.iteration, run.total_s, event.checkpoint)
        last = run.trial.ends_at is not None and event.iteration >= run.trial.ends_at
        ends = run.trial.is_finished() or last or self._halt.reason is not None
        self._answer(run, self._ending(run, Stop(save=last)) if ends else Go())

    def _resulted(self, run: Run, event: Reported) -> None:
        trial = run.trial
        draft = ResultReported(
            time=now(),
            trial=trial.trial_id,
            iteration=event.iteration,
            metrics=event.metrics,
            this_s=event.time_this_iter_s,
            total_s=run.total_s,
            since=run.since,
            checkpoint=event.checkpoint.name if event.checkpoint is not None else None,
            bytes=event.checkpoint.bytes if event.checkpoint is not None else 0,
            left_out=event.left_out,
        )
        self._history.reported(draft)
        result = trial.last_result
        result[DONE] = bool(event.metrics.get(DONE))
        self._audience.resulted(trial, result)
        done, result[DONE] = bool(result[DONE]), False
        verdict = self._decider.resulted(trial, result, done=done)
        record = replace(
            draft,
            metrics={name: value for name, value in result.items() if name not in AUTOMATIC_FIELDS},
            decision=verdict.decision,
            why=verdict.why,
            acts=verdict.acts,
            callbacks=self._audience.changed_states(),
            saves=self._saves_last(trial, verdict, saved=event.checkpoint is not None),
        )
        self._journal.add(record)
        self._history.decided(record, acted=True)
        saved = event.checkpoint is not None
        if saved:
            self._ledger.kept(trial)
        self._ledger.stopped(verdict.acts, by=trial)
        if verdict.problem is not None:
            run.over = True
            self._executor.kill(run.id)
            self._ledger.refused(trial, verdict.problem)
            return
        self._carry_out(run, verdict, save=bool(result.get(SHOULD_CHECKPOINT)) and not saved, saved=saved)

    def _carry_out(self, run: Run, verdict: Verdict, *, save: bool, saved: bool) -> None:
        """Answer the trial that reported."""
        trial, is_class = run.trial, self._options.is_class
        exploited = any(act.do == "exploit" and act.trial == trial.trial_id for act in verdict.acts)
        if exploited:
            self._answer(run, self._ending(run, Stop()))
        elif trial.is_finished():
            self._ledger.completed(trial)
            self._answer(run, self._ending(run, Stop(save=trial.ends_at is not None)))
        elif trial.status != RUNNING or self._halt.reason is not None:
            self._answer(run, self._ending(run, Stop(save=is_class and not saved)))
        else:
            self._answer(run, Go(save=is_class and not saved and (save or verdict.save)))

    def _end_stopped(self) -> None:
        """End the runs of trials that a scheduler stopped, or made wait, as another one reported or ended."""
        for run in self._runs.values():
            if not run.over and run.trial.status != RUNNING:
                run.over = True
                self._executor.kill(run.id)
            elif run.trial.is_finished() and run.trial.ends_at is None:
                run.saving = False  # what it was to wait with

    def _saves_last(self, trial: Trial, verdict: Verdict, *, saved: bool) -> bool:
        """Whether a trial ends with this result, and with a checkpoint that it has yet to save."""
        ends = verdict.decision == "STOP" or trial.is_finished()
        return ends and verdict.problem is None and self._options.save_at_end and not saved

    def _ending(self, run: Run, order: Stop) -> Order:
        """The last order to a run; without a checkpoint to wait for, its process may take the next trial."""
        run.over, run.saving = True, order.save
        return order if order.save else self._replaced(run, order)

    def _replaced(self, run: Run, order: Stop) -> Order:
        if not self._options.reuse or self._halt.reason is not None or run.silenced is not None:
            return order
        trial = self._starter.next_trial()
        if trial is None or trial.resources != run.trial.resources:
            return order
        if any(other.trial is trial for other in self._runs.values() if other is not run):
            return order
        del self._runs[run.id]
        found = self._new_run(trial)
        self._audience.started(trial, restored=found.job.checkpoint is not None)
        return Next(job=found.job)

    def _launch_replacement(self, gone: str) -> None:
        """A process is gone before it was told which trial it goes on with: that gets one of its own."""
        for run, order in self._answers:
            if run.id == gone and isinstance(order, Next):
                self._answers.remove((run, order))
                self._settle()
                self._executor.launch(order.job)
                return

    def _saved(self, run: Run, event: Saved) -> None:
        run.saving = False
        if event.checkpoint is not None:
            self._ledger.saved(run.trial, event.iteration, run.total_s, event.checkpoint)
        self._answer(run, self._replaced(run, Stop()) if run.over else Go())

    def _ended(self, run: Run) -> None:
        del self._runs[run.id]
        if run.over:
            return
        self._ledger.ended(run.trial)

    def _failed(self, run: Run, event: Failed) -> None:
        del self._runs[run.id]
        if run.over and not (run.saving and self._halt.reason != "interrupted"):
            if not event.killed:
                self._showing.say(f"{run.trial} failed as it ended; what it had saved counts: {event.error}")
            return
        error = event.error
        if run.silenced is not None:
            error = f"nothing was heard of it for {run.silenced:.0f} s, more than "
            error += "FailureConfig.max_silence_s; it was killed"
        self._ledger.failed(run.trial, error, event.traceback)

    # ---------------------------------------------------------------------------------- settling

    def _answer(self, run: Run, order: Order) -> None:
        self._answers.append((run, order))

    def _settle(self) -> None:
        """Write down what was decided; then do it."""
        doomed = self._keeper.doomed(now())
        self._journal.commit()
        answers, self._answers = self._answers, []
        for run, order in answers:
            self._executor.order(run.id, order)
        self._keeper.delete(doomed)

    def _watch(self) -> None:
        """Is the time over, is a trial silent for too long, does somebody want to end all?"""
        self._halt.look(self._history, self._decider.stopper)
        message = self._halt.message()
        if message is not None:
            self._showing.say(message)
        silence = self._options.failures.max_silence_s
        at_s = time.monotonic()
        overdue = self._halt.overdue(at_s, self._options.grace_s)
        for run in [run for run in self._runs.values() if not run.over]:
            if overdue:
                self._showing.say(f"{run.trial} does not report in time to end well, and is killed")
                run.over = True
                self._executor.kill(run.id)
            elif silence is not None and at_s - run.heard_s > silence:
                run.silenced = at_s - run.heard_s
                self._executor.kill(run.id)
