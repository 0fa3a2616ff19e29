"""What a training run chose about its checkpoints, as written into each of them: `environment.saving`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from keepstep.cli.phrasing import counted

__all__ = ["describe_saving"]


def describe_saving(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values as text; nothing if the checkpoint says nothing of it, or says it in another way."""
    said = environment.get("saving")
    if not isinstance(said, dict) or not isinstance(said.get("rule"), str):
        return
    yield "rule", said["rule"]
    interval = [f"{said['interval_s']:.3g} s"] if _is_number(said.get("interval_s")) else []
    if _is_number(said.get("interval_steps")):
        interval.append(f"about {counted(int(said['interval_steps']), 'step')}")
    yield "interval", ", ".join(interval) or "not known yet"
    yield "cost", _cost(said.get("cost"))
    counts = said.get("counts")
    if isinstance(counts, dict):
        yield "before it", _counts(counts)


def _cost(cost: Any) -> str:
    names = {"blocked_s": "blocked", "waited_s": "waited for the copy", "slowed_s": "in slower steps"}
    if not isinstance(cost, dict):
        return "not known yet"
    known = {name: cost[name] for name in names if _is_number(cost.get(name))}
    parts = ", ".join(f"{value:.3g} s {names[name]}" for name, value in known.items())
    return f"{sum(known.values()):.3g} s a save ({parts})" if parts else "not known yet"


def _counts(counts: Mapping[str, Any]) -> str:
    shown = ("saved", "failed", "skipped", "waited", "redone")
    parts = [f"{counts[name]} {name}" for name in shown if _is_number(counts.get(name))]
    if _is_number(counts.get("waited_s")) and counts.get("waited"):
        parts.append(f"{counts['waited_s']:.3g} s waited in all")
    return ", ".join(parts) or "-"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
