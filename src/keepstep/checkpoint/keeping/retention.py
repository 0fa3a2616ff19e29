"""Keep or drop, with the reason: a pure function of what the catalog says. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keepstep.checkpoint.keeping.catalog import Entry, number_of
from keepstep.errors import UsageError

__all__ = ["Decision", "Retention", "decide"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints a store keeps. With all fields None it keeps everything.

    A checkpoint is kept if any rule wants it. The newest, pinned and tagged ones are always kept.

    Attributes:
        keep_last: that many newest.
        keep_best: (metric, "min" or "max", how many).
        keep_every_n_steps: those whose step is a multiple of this.
        byte_budget: drop the oldest that only `keep_last` or `keep_every_n_steps` (or no rule) wants
            until all fit into this many bytes.
    """

    keep_last: int | None = None
    keep_best: tuple[str, Literal["min", "max"], int] | None = None
    keep_every_n_steps: int | None = None
    byte_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every_n_steps", "byte_budget"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(
                    f"{name} is {value!r}; expected a whole number of at least 1, or None for no limit"
                )
        if self.keep_best is not None:
            self._check_best(self.keep_best)

    @staticmethod
    def _check_best(best: object) -> None:
        good = (
            isinstance(best, tuple)
            and len(best) == 3
            and isinstance(best[0], str)
            and best[1] in ("min", "max")
            and isinstance(best[2], int)
            and best[2] >= 1
        )
        if not good:
            raise UsageError(
                f'keep_best is {best!r}; expected (metric, "min" or "max", count), as ("val_loss", "min", 2)'
            )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped."""
        return self == Retention()


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What happens to one checkpoint, and why."""

    entry: Entry
    keep: bool
    reason: str


def decide(entries: Sequence[Entry], retention: Retention) -> list[Decision]:
    """Decide over every checkpoint of a store.

    Args:
        entries: oldest first, as `catalog.scan` gives them.
        retention: the rules.

    Returns:
        A decision for each, in the same order. Entries without a readable manifest are kept: damage is
        for a person to look at.
    """
    reasons = _protected(entries)
    soft = _wanted(entries, retention)
    best = _best(entries, retention)
    keep_everything = (
        retention.keep_last is None and retention.keep_best is None and retention.keep_every_n_steps is None
    )
    decisions = []
    for entry in entries:
        reason = reasons.get(entry.number) or best.get(entry.number) or soft.get(entry.number)
        if reason is None and keep_everything:
            reason = "no rule drops it"
        decisions.append(Decision(entry=entry, keep=reason is not None, reason=reason or "no rule keeps it"))
    if retention.byte_budget is None:
        return decisions
    return _within_budget(decisions, retention.byte_budget, firm=reasons.keys() | best.keys())


def _protected(entries: Sequence[Entry]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    readable = [entry for entry in entries if entry.manifest is not None]
    for entry in entries:
        if entry.manifest is None:
            reasons[entry.number] = "damaged; delete it yourself"
        elif entry.manifest.pinned:
            reasons[entry.number] = "pinned"
        elif entry.manifest.tags:
            reasons[entry.number] = f"tagged {', '.join(entry.manifest.tags)}"
    if readable:
        reasons.setdefault(readable[-1].number, "the newest")
    return reasons


def _wanted(entries: Sequence[Entry], retention: Retention) -> dict[int, str]:
    reasons: dict[int, str] = {}
    every = retention.keep_every_n_steps
    for entry in entries:
        step = entry.manifest.step if entry.manifest else None
        if every is not None and step is not None and step % every == 0:
            reasons[entry.number] = f"step {step} is a multiple of {every}"
    if retention.keep_last is not None:
        readable = [entry for entry in entries if entry.manifest is not None]
        for entry in readable[-retention.keep_last :]:
            reasons[entry.number] = f"one of the last {retention.keep_last}"
    return reasons


def _best(entries: Sequence[Entry], retention: Retention) -> dict[int, str]:
    if retention.keep_best is None:
        return {}
    metric, mode, count = retention.keep_best
    scored = []
    for entry in entries:
        value = number_of(entry.manifest.metrics, metric) if entry.manifest else None
        if value is not None:
            scored.append((value if mode == "min" else -value, -entry.number, entry))
    scored.sort(key=lambda item: item[:2])
    return {entry.number: f"one of the {count} best by {metric} ({mode})" for _, _, entry in scored[:count]}


def _within_budget(decisions: list[Decision], budget: int, *, firm: set[int]) -> list[Decision]:
    total = sum(d.entry.manifest.bytes for d in decisions if d.keep and d.entry.manifest)
    final = []
    for decision in decisions:  # oldest first
        size = decision.entry.manifest.bytes if decision.entry.manifest else 0
        if decision.keep and total > budget and decision.entry.number not in firm:
            total -= size
            decision = Decision(entry=decision.entry, keep=False, reason=f"over the byte budget of {budget}")
        final.append(decision)
    return final
