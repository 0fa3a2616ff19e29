"""Where a run is killed, and what each kill cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from examples.demo.training import Deadline, DemoError, FinishedTooSoonError, Loss, Training

__all__ = ["Kill", "PlannedKill", "kill_now", "plan", "resumed"]

SHARE_OF_STEPS = (0.05, 0.8)  # not so late that the run may be over before the signal comes
LATEST_WITHIN_STEP_S = 0.05


@dataclass(frozen=True, kw_only=True)
class PlannedKill:
    """When to kill.

    Attributes:
        after_step: as soon as this step is in the log ...
        delay_s: ... and so many seconds on.
        while_saving: then wait for a checkpoint being written.
    """

    after_step: int
    delay_s: float
    while_saving: bool


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What a kill did.

    Attributes:
        at_step: the last step that was done.
        committed_step: step of the newest checkpoint; 0 if there was none.
        unfinished: the checkpoint that was being written, if one was.
        resumed_from: the step the next attempt went on from; None before it did.
    """

    at_step: int
    committed_step: int
    unfinished: str | None
    resumed_from: int | None = None

    @property
    def lost_steps(self) -> int:
        """Steps that had to be done again."""
        return self.at_step - (self.committed_step if self.resumed_from is None else self.resumed_from)

    @property
    def in_words(self) -> str:
        """Where it hit."""
        hit = f", while {self.unfinished} was being written" if self.unfinished else ""
        return f"after step {self.at_step}{hit}"


def plan(seed: int, *, steps: int, kills: int) -> list[PlannedKill]:
    """Draw the instants of the kills; at least one of them is while a checkpoint is being written.

    Raises:
        DemoError: there are too few steps for so many kills.
    """
    draw = random.Random(seed)
    first, last = (round(share * steps) for share in SHARE_OF_STEPS)
    if last - max(first, 2) < kills or kills < 1:
        raise DemoError(
            f"{kills} kills in {steps} steps: at least one kill, and twice as many steps, are needed."
        )
    after = sorted(draw.sample(range(max(first, 2), last), kills))
    saving = draw.randrange(kills)
    return [
        PlannedKill(
            after_step=step,
            delay_s=draw.uniform(0, LATEST_WITHIN_STEP_S),
            while_saving=number == saving,
        )
        for number, step in enumerate(after)
    ]


def kill_now(training: Training, planned: PlannedKill, deadline: Deadline) -> Kill:
    """Kill a run whose time has come."""
    deadline.pause("the delay before a kill", planned.delay_s)
    if training.is_over():
        raise FinishedTooSoonError(f"{training.name} finished before it could be killed.")
    if planned.while_saving:
        training.kill_while_saving(deadline)
    else:
        training.kill()
    unfinished = training.unfinished()
    if planned.while_saving and unfinished is None:
        raise DemoError(
            f"{training.name} was killed while it was saving, but no unfinished checkpoint is there."
        )
    newest = training.store.latest()
    committed_step = 0 if newest is None or newest.step is None else newest.step
    return Kill(at_step=training.attempt_step, committed_step=committed_step, unfinished=unfinished)


def resumed(kills: Sequence[Kill], losses: Sequence[Loss]) -> list[Kill]:
    """Add to each kill where the next attempt went on.

    Raises:
        DemoError: an attempt did not go on from the newest checkpoint.
    """
    first_steps = [losses[0].step] + [b.step for a, b in pairwise(losses) if a.pid != b.pid]
    if len(first_steps) != len(kills) + 1:
        raise DemoError(f"{len(kills)} kills must give {len(kills) + 1} attempts, not {len(first_steps)}.")
    done = [replace(kill, resumed_from=step - 1) for kill, step in zip(kills, first_steps[1:], strict=True)]
    for number, kill in enumerate(done, 1):
        if kill.resumed_from != kill.committed_step:
            raise DemoError(
                f"After kill {number} the newest checkpoint was of step {kill.committed_step}, but the next "
                f"attempt went on from step {kill.resumed_from}."
            )
    return done
