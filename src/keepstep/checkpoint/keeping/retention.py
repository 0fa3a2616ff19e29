"""Keep or drop, with the reason: a pure function of what the catalog says. No torch."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from keepstep.checkpoint.keeping.catalog import Entry, number_of
from keepstep.errors import UsageError

__all__ = ["Decision", "Held", "Retention", "decide", "is_number"]

Held = Mapping[Hashable, int]
"""What a checkpoint takes where it lies, without the manifest: identity of each file -> bytes.

Checkpoints that share a file give it the same identity: device and inode of a hard link, the key of an object
in a bucket.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints a store keeps. With all fields None it keeps everything.

    A checkpoint is kept if any rule wants it. The newest, pinned and tagged ones are always kept.

    Attributes:
        keep_last: that many newest.
        keep_best: (metric, "min" or "max", how many).
        keep_every_n_steps: those whose step is a multiple of this.
        keep_within_s: those saved in the last so many seconds before the newest one was, and the one before
            the newest however old it is. Time counts back from the newest, so a store that nobody writes to
            loses nothing; a time later than the newest one's (the clock went back) counts as that of the
            checkpoint that came next.
        byte_budget: drop the oldest that only `keep_last`, `keep_every_n_steps` or `keep_within_s` (or no
            rule) wants until all fit into this many bytes; what several checkpoints share counts once.
    """

    keep_last: int | None = None
    keep_best: tuple[str, Literal["min", "max"], int] | None = None
    keep_every_n_steps: int | None = None
    keep_within_s: float | None = None
    byte_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every_n_steps", "byte_budget"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(
                    f"{name} is {value!r}; expected a whole number of at least 1, or None for no limit"
                )
        within = self.keep_within_s
        if within is not None and not (is_number(within) and 0 < within < math.inf):
            raise UsageError(
                f"keep_within_s is {within!r}; expected more than 0 seconds, or None for no limit"
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


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What happens to one checkpoint, and why.

    Attributes:
        entry: the checkpoint.
        keep: whether it stays.
        reason: why.
        frees_bytes: what deleting it frees, once those dropped before it are gone; 0 if it stays.
    """

    entry: Entry
    keep: bool
    reason: str
    frees_bytes: int = 0


def decide(
    entries: Sequence[Entry], retention: Retention, held: Mapping[int, Held] | None = None
) -> list[Decision]:
    """Decide over every checkpoint of a store.

    Args:
        entries: oldest first, as `catalog.scan` gives them.
        retention: the rules.
        held: what each takes, by number. None: what the manifests say, nothing shared.

    Returns:
        A decision for each, in the same order. Entries without a readable manifest are kept: damage is
        for a person to look at.
    """
    firm = _best(entries, retention) | _protected(entries)
    soft = _wanted(entries, retention)
    keep_everything = replace(retention, byte_budget=None).keeps_all
    decisions = []
    for entry in entries:
        reason = firm.get(entry.number) or soft.get(entry.number)
        if reason is None and keep_everything:
            reason = "no rule drops it"
        decisions.append(Decision(entry=entry, keep=reason is not None, reason=reason or "no rule keeps it"))
    if held is None:
        held = {entry.number: _unshared(entry) for entry in entries}
    return _weighed(decisions, held, retention.byte_budget, firm=firm.keys())


def _unshared(entry: Entry) -> Held:
    files = entry.manifest.files if entry.manifest else {}
    return {(entry.number, name): file.bytes for name, file in files.items()}


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
    readable = [entry for entry in entries if entry.manifest is not None]
    if retention.keep_within_s is not None:
        reasons.update(_young(readable, retention.keep_within_s))
    if retention.keep_last is not None:
        for entry in readable[-retention.keep_last :]:
            reasons[entry.number] = f"one of the last {retention.keep_last}"
    return reasons


def _young(readable: Sequence[Entry], within_s: float) -> dict[int, str]:
    """Order is given by numbers, not by clocks: a clock that jumps must not empty a store."""
    reasons = {entry.number: "the one before the newest" for entry in readable[-2:-1]}
    newest_s: float | None = None
    at_s = math.inf
    for entry in reversed(readable):
        said_s = _seconds(entry)
        newest_s = said_s if newest_s is None else newest_s
        if said_s is not None and newest_s is not None and said_s <= newest_s:
            at_s = said_s
        if newest_s is None or newest_s - at_s <= within_s:
            reasons.setdefault(entry.number, f"saved in the last {within_s:g} s")
    return reasons


def _seconds(entry: Entry) -> float | None:
    """When it was saved, in seconds since 1970; None if its manifest gives no time."""
    try:
        said = dt.datetime.fromisoformat(entry.manifest.created_at if entry.manifest else "")
        return (said if said.tzinfo else said.replace(tzinfo=dt.UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


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


def _weighed(
    decisions: Sequence[Decision], held: Mapping[int, Held], budget: int | None, *, firm: Collection[int]
) -> list[Decision]:
    """Drop for the budget as well, and say what each deletion frees: files that no other one shares."""
    holders = Counter(file for decision in decisions for file in held.get(decision.entry.number, {}))
    dropped: dict[int, int] = {}

    def drop(number: int) -> None:
        files = held.get(number, {})
        holders.subtract(files.keys())
        dropped[number] = sum(size for file, size in files.items() if holders[file] == 0)

    for decision in decisions:
        if not decision.keep:
            drop(decision.entry.number)
    sizes = {file: size for files in held.values() for file, size in files.items()}
    total = sum(size for file, size in sizes.items() if holders[file] > 0)
    final = []
    for decision in decisions:  # oldest first
        number = decision.entry.number
        if decision.keep and budget is not None and total > budget and number not in firm:
            drop(number)
            total -= dropped[number]
            decision = replace(decision, keep=False, reason=f"over the byte budget of {budget}")
        final.append(replace(decision, frees_bytes=dropped.get(number, 0)))
    return final
