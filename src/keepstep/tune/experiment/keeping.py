"""Which checkpoints of trials stay: pure functions of what there is."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from keepstep.tune.experiment.trial import CheckpointRecord
from keepstep.tune.result import TIME_TOTAL_S, TRAINING_ITERATION, look_up

__all__ = ["Holding", "Key", "Rules", "Verdict", "key_of", "over_budget", "superfluous"]

Key = tuple[str, str]
"""A checkpoint of an experiment: (trial_id, name)."""


class Rules(Protocol):
    """What says which checkpoints are kept; `CheckpointConfig` does."""

    num_to_keep: int | None
    checkpoint_score_attribute: str | None
    checkpoint_score_order: Literal["max", "min"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """What a trial has.

    Attributes:
        records: its checkpoints that are still there, oldest first.
        may_go_on: whether it may still be started from the newest of them. Only a trial that has ended well
            may not.
    """

    records: Sequence[CheckpointRecord]
    may_go_on: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is to go.

    Attributes:
        drop: to be deleted, in this order.
        messages: what has to be said once for an experiment, by what it is about.
    """

    drop: tuple[CheckpointRecord, ...] = ()
    messages: Mapping[str, str] = field(default_factory=dict)


def key_of(record: CheckpointRecord) -> Key:
    """What names a checkpoint within its experiment."""
    return record.trial_id, record.name


def superfluous(holding: Holding, rules: Rules, *, pinned: Collection[Key] = ()) -> Verdict:
    """Which checkpoints of one trial are too many.

    Of a trial that may go on, the newest stays and counts, and with it the best of the others. Of one that
    has ended, the best stay. Without a score the newest are the best.

    Args:
        holding: what the trial has.
        rules: how many are kept, and which are best.
        pinned: what a paused trial, an exploit or a restore refers to, and what a running trial was started
            from: never dropped. They don't take the place of better ones.
    """
    records, count = holding.records, rules.num_to_keep
    if count is None or len(records) <= count:
        return Verdict()
    messages: dict[str, str] = {}
    ranked = _from_best(records, rules, messages)
    if holding.may_go_on:
        newest = records[-1]
        kept = [newest, *[record for record in ranked if record is not newest][: count - 1]]
        if count == 1 and rules.checkpoint_score_attribute is not None:
            messages["one to keep"] = _ONE.format(score=rules.checkpoint_score_attribute)
    else:
        kept = ranked[:count]
    stays = {key_of(record) for record in kept} | set(pinned)
    return Verdict(drop=tuple(r for r in records if key_of(r) not in stays), messages=messages)


_ONE: Final = (
    "CheckpointConfig(num_to_keep=1) keeps the newest checkpoint of a trial, which it needs to go on; so the "
    "best one by {score!r} may go. num_to_keep=2 keeps the newest and the best"
)


def over_budget(
    holdings: Sequence[Holding], budget_bytes: int, rules: Rules, *, pinned: Collection[Key] = ()
) -> Verdict:
    """Which checkpoints have to go so that those of an experiment take no more than so many bytes.

    First those of trials that have ended, the worst first, but the best of each; then those of the others,
    the worst first, but the newest of each; then the last ones of trials that have ended, the worst first,
    but the best of all. What is pinned, and what a trial needs to go on, never goes.

    Args:
        holdings: of all trials, those that have something.
        budget_bytes: for all of them together; what several checkpoints share is counted with each.
        rules: which are best.
        pinned: as for `superfluous`.
    """
    excess = sum(record.bytes for holding in holdings for record in holding.records) - budget_bytes
    if excess <= 0:
        return Verdict()
    messages: dict[str, str] = {}
    drop = []
    for record in _in_turn(holdings, rules, messages):
        if excess <= 0:
            break
        if key_of(record) not in pinned:
            drop.append(record)
            excess -= record.bytes
    if excess > 0:
        messages["budget"] = (
            f"the checkpoints of all trials take {excess} bytes more than byte_budget={budget_bytes}, and "
            "none of those that are left may go: trials need them to go on, or they are the best. Give it "
            "more, or run fewer trials at a time"
        )
    return Verdict(drop=tuple(drop), messages=messages)


def _in_turn(
    holdings: Sequence[Holding], rules: Rules, messages: dict[str, str]
) -> Iterable[CheckpointRecord]:
    ended = [_from_best(h.records, rules, messages) for h in holdings if not h.may_go_on and h.records]
    yield from _from_worst([record for ranked in ended for record in ranked[1:]], rules, messages)
    others = [record for h in holdings if h.may_go_on for record in h.records[:-1]]
    yield from _from_worst(others, rules, messages)
    yield from _from_worst([ranked[0] for ranked in ended], rules, messages)[:-1]


def _from_worst(
    records: Sequence[CheckpointRecord], rules: Rules, messages: dict[str, str]
) -> list[CheckpointRecord]:
    """Of several trials; of equals the one of the earlier iteration first."""
    by_age = sorted(records, key=lambda record: record.iteration)
    return _from_best(by_age, rules, messages)[::-1]


def _from_best(
    records: Sequence[CheckpointRecord], rules: Rules, messages: dict[str, str]
) -> list[CheckpointRecord]:
    """By score, those without one last; of equals the later one (in `records`) first."""
    name = rules.checkpoint_score_attribute
    scores = [_score(record, name, messages) if name is not None else 0.0 for record in records]
    sign = 1.0 if rules.checkpoint_score_order == "max" else -1.0

    def merit(index: int) -> tuple[bool, float, int]:
        score = scores[index]
        return (True, sign * score, index) if not math.isnan(score) else (False, 0.0, index)

    return [records[index] for index in sorted(range(len(records)), key=merit, reverse=True)]


def _score(record: CheckpointRecord, name: str, messages: dict[str, str]) -> float:
    """The score of a checkpoint; NaN is the worst, and so is what is no number."""
    found = _look_up(record, name)
    if isinstance(found, int | float):
        try:
            return float(found)
        except OverflowError:
            return math.inf if found > 0 else -math.inf
    if found is None:
        said = f"is not in the result that came with it (which has: {_names(record.metrics)})"
    else:
        said = f"is {found!r:.100} there, which is no number"
    messages.setdefault(
        "score",
        f"checkpoint_score_attribute={name!r}: trial {record.trial_id} reported {record.name}, and {name!r} "
        f"{said}. Such checkpoints count as the worst; report that metric with each checkpoint",
    )
    return math.nan


def _look_up(record: CheckpointRecord, name: str) -> Any:
    automatic = {TRAINING_ITERATION: record.iteration, TIME_TOTAL_S: record.time_total_s}
    found = look_up(record.metrics, name)
    return automatic.get(name) if found is None else found


def _names(metrics: Mapping[str, Any]) -> str:
    return ", ".join(sorted(metrics)[:20]) or "nothing"
