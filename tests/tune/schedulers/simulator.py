"""An experiment without processes: real records, real decisions, trials that are a formula.

Trials learn in steps. What a trial knows (its weight) is in its checkpoints and goes on from them; failures,
kills of the driver and how long saves take are drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepstep.errors import TrialError
from keepstep.tune.driver.deciding import Decider, Suggestion
from keepstep.tune.driver.replay import replay
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import (
    CheckpointSaved,
    DriverStarted,
    ExperimentMade,
    Record,
    ResultReported,
    TrialAgain,
    TrialEnded,
    TrialFailed,
    TrialMade,
    TrialStarted,
    parse_record,
    to_node,
)
from keepstep.tune.experiment.trial import ERROR, PAUSED, PENDING, RUNNING, Trial
from keepstep.tune.schedulers.base import TrialScheduler
from keepstep.tune.search.base import Searcher
from keepstep.tune.stopper import Stopper

Learn = Callable[[Mapping[str, Any], float, int], tuple[float, float]]
"""(config, weight before, iteration) -> (weight after, score)."""


def by_quality(config: Mapping[str, Any], weight: float, iteration: int) -> tuple[float, float]:
    """A trial tends towards its configuration's quality."""
    after = weight + 0.2 * (config["quality"] - weight)
    return after, after


@dataclass(frozen=True, kw_only=True)
class World:
    """What trials run in.

    Attributes:
        slots: how many run at a time.
        end: iterations after which a trial ends by itself.
        seed: of everything that happens.
        classes: trials save when they are asked to; else they report checkpoints by themselves.
        every: with so many results each; 0: never.
        fails: how likely a step fails.
        final: how likely a failure is for good.
        kills: how likely the driver is killed between two steps.
        revivals: how likely a trial that failed is run again.
        pending: most trials that wait; None: all are made at once.
        steps: the end of patience.
    """

    slots: int = 2
    end: int = 12
    seed: int = 0
    classes: bool = True
    every: int = 1
    fails: float = 0.0
    final: float = 0.5
    kills: float = 0.0
    revivals: float = 0.0
    pending: int | None = None
    steps: int = 100_000


class Given(Searcher):
    """These configurations, in this order."""

    def __init__(self, configs: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._left = list(configs)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        return dict(self._left.pop(0)) if self._left else Searcher.FINISHED


class Never(Stopper):
    """Ends nothing."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False


@dataclass
class Run:
    """One start of a trial."""

    trial: Trial
    weight: float
    iteration: int
    saving: bool = False
    over: bool = False


@dataclass
class Simulation:
    """An experiment.

    Attributes:
        make: a new scheduler, as often as the driver is started.
        configs: of the trials.
        world: what they run in.
        learn: what a step does.
        check: called after each turn.
    """

    make: Callable[[], TrialScheduler]
    configs: Sequence[Mapping[str, Any]]
    world: World = World()
    learn: Learn = by_quality
    check: Callable[[Simulation], None] | None = None
    records: list[Record] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    spent: int = 0
    """Steps of training that all trials did."""
    starts: int = 0

    def __post_init__(self) -> None:
        self.made = ExperimentMade(time=0.0, id="sim", name="sim", trainable="formula", seed=0, spec={})
        self._chance = random.Random(self.world.seed)
        self._weights: dict[tuple[str, str], float] = {}
        self._exhausted = False
        self._start_driver()

    def _start_driver(self) -> None:
        self.history = History(self.made, "/sim")
        self.scheduler = self.make()
        self.scheduler.set_search_properties("score", "max", {}, saves_when_asked=self.world.classes)
        self.decider = Decider(
            self.history,
            searcher=Given(self.configs),
            scheduler=self.scheduler,
            stopper=Never(),
            param_space={},
        )

    # ---------------------------------------------------------------------------------------- turns

    def run(self) -> Simulation:
        for _ in range(self.world.steps):
            self._start_trials()
            if self.check is not None:
                self.check(self)
            if not self.runs:
                return self
            self._step(self._chance.choice(list(self.runs.values())))
            self.messages += self.decider.messages()
            if self._chance.random() < self.world.revivals:
                self._revive()
            if self._chance.random() < self.world.kills:
                self.kill()
        raise AssertionError(f"no end after {self.world.steps} steps: {self.scheduler.debug_string()}")

    def kill(self) -> None:
        """The driver dies; a new one reads what it had written down, and must decide as it did."""
        self.runs.clear()
        stood = [trial.status if trial.status != RUNNING else PENDING for trial in self.history.all]
        self._start_driver()
        replay([parse_record(to_node(record)) for record in self.records], self.history, self.decider)
        self.decider.messages()
        self._write(DriverStarted(time=0.0, host="", pid=0))
        assert [trial.status for trial in self.history.all] == stood

    def _write(self, record: Record) -> None:
        self.records.append(record)
        self.history.apply(record)

    def _make_trials(self) -> None:
        limit = None if self.scheduler.whole_population else self.world.pending
        while not self._exhausted:
            waiting = sum(trial.status == PENDING for trial in self.history.live.values())
            if limit is not None and waiting >= limit:
                return
            number = len(self.history.all)
            suggested = self.decider.suggest(f"t{number}", number)
            if not isinstance(suggested, Suggestion):
                self._exhausted = True
                return
            self._write(
                TrialMade(
                    time=0.0,
                    trial=f"t{number}",
                    config=suggested.config,
                    evaluated=suggested.evaluated,
                    tag=str(number),
                    dirname=f"t{number}",
                    resources={"cpu": 1.0},
                )
            )
            self.history.all[-1].config = suggested.config
            self.decider.added(self.history.all[-1])

    def _start_trials(self) -> None:
        while len(self.runs) < self.world.slots:
            self._make_trials()
            trial = self.decider.choose()
            assert self.decider.choose() is trial, "choosing changes nothing"
            if trial is None or trial.trial_id in self.runs:
                return
            assert trial.status in (PENDING, PAUSED), f"{trial} was chosen, and is {trial.status}"
            found = trial.resume_from
            self.runs[trial.trial_id] = Run(
                trial,
                weight=0.0 if found is None else self._weights[found.trial_id, found.name],
                iteration=0 if found is None else found.iteration,
            )
            self._write(TrialStarted(time=0.0, trial=trial.trial_id, pid=0, host="", ip=""))
            self.starts += 1

    # --------------------------------------------------------------------------------- one trial's step

    def _step(self, run: Run) -> None:
        if run.saving:
            self._saved(run)
        elif self._chance.random() < self.world.fails:
            self._failed(run)
        elif run.iteration >= self.world.end:
            self._ended(run)
        else:
            self._learned(run)

    def _saved(self, run: Run) -> None:
        run.saving = False
        self._write(
            CheckpointSaved(
                time=0.0,
                trial=run.trial.trial_id,
                iteration=run.iteration,
                total_s=float(run.iteration),
                checkpoint=self._checkpoint(run),
                bytes=1,
            )
        )
        if run.over:
            del self.runs[run.trial.trial_id]

    def _checkpoint(self, run: Run) -> str:
        name = f"checkpoint_{run.trial.next_checkpoint:06d}"
        self._weights[run.trial.trial_id, name] = run.weight
        return name

    def _learned(self, run: Run) -> None:
        trial = run.trial
        run.iteration += 1
        run.weight, score = self.learn(trial.config, run.weight, run.iteration)
        self.spent += 1
        if run.iteration <= trial.iteration:
            return  # the driver has this result already
        saves = not self.world.classes and self.world.every > 0 and run.iteration % self.world.every == 0
        draft = ResultReported(
            time=0.0,
            trial=trial.trial_id,
            iteration=run.iteration,
            metrics={"score": score},
            this_s=1.0,
            total_s=float(run.iteration),
            since=1,
            checkpoint=self._checkpoint(run) if saves else None,
        )
        self.history.reported(draft)
        verdict = self.decider.resulted(trial, trial.last_result, done=False)
        if verdict.problem is not None:
            raise TrialError(verdict.problem)
        record = ResultReported(
            **{name: getattr(draft, name) for name in ("time", "trial", "iteration", "metrics", "this_s")},
            total_s=draft.total_s,
            since=draft.since,
            checkpoint=draft.checkpoint,
            decision=verdict.decision,
            why=verdict.why,
            acts=verdict.acts,
        )
        self.records.append(record)
        self.history.decided(record, acted=True)
        self._carry_out(run, exploited=verdict.decision == "NOOP", save=verdict.save)

    def _carry_out(self, run: Run, *, exploited: bool, save: bool) -> None:
        for name, other in list(self.runs.items()):
            if other is not run and other.trial.status != RUNNING and not other.over:
                del self.runs[name]
        status = run.trial.status
        if status == RUNNING:
            run.saving = save and self.world.classes
        elif status == PAUSED and not exploited and self.world.classes:
            run.saving = run.over = True
        else:
            del self.runs[run.trial.trial_id]

    def _failed(self, run: Run) -> None:
        del self.runs[run.trial.trial_id]
        final = self._chance.random() < self.world.final
        draft = TrialFailed(time=0.0, trial=run.trial.trial_id, error="chance", final=final)
        self.history.failed(draft, acted=True)
        acts = self.decider.failed(run.trial) if final else ()
        self.records.append(TrialFailed(time=0.0, trial=draft.trial, error="chance", final=final, acts=acts))
        self._carry_out_acts()

    def _ended(self, run: Run) -> None:
        del self.runs[run.trial.trial_id]
        draft = TrialEnded(time=0.0, trial=run.trial.trial_id)
        self.history.completed(draft, acted=True)
        self.records.append(TrialEnded(time=0.0, trial=draft.trial, acts=self.decider.completed(run.trial)))
        self._carry_out_acts()

    def _carry_out_acts(self) -> None:
        for name, other in list(self.runs.items()):
            if other.trial.status != RUNNING and not other.over:
                del self.runs[name]

    def _revive(self) -> None:
        failed = [trial for trial in self.history.all if trial.status == ERROR]
        if failed:
            trial = self._chance.choice(failed)
            self._write(TrialAgain(time=0.0, trial=trial.trial_id, anew=self._chance.random() < 0.5))
            self.decider.again(trial)

    # ------------------------------------------------------------------------------------------- looking

    @property
    def trials(self) -> Sequence[Trial]:
        return self.history.all

    def reached(self) -> dict[int, int]:
        """{number of the trial: its last iteration}."""
        return {trial.number: trial.iteration for trial in self.trials}
