"""Metrics as a reader of a list sees them: which there are, which way is better, which is best."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from keepstep.checkpoint.keeping.catalog import Entry
from keepstep.errors import UsageError

__all__ = ["Metric", "all_metrics", "choose_metric", "direction_of", "merit"]

Direction = Literal["min", "max"]

_SMALLER_IS_BETTER = re.compile(
    r"(loss|losses|nll|ce|bce|kl|err|error|errors|mse|rmse|mae|mape|wer|cer|per|ppl|perplexity|bpb|bpc|fid|kid|lpips)\d*"
)
_LARGER_IS_BETTER = re.compile(
    r"(acc|accuracy|auc|auroc|auprc|roc|fbeta|precision|recall|ap|map|mrr|ndcg|iou|miou|dice|bleu|rouge|meteor|"
    r"psnr|ssim|score|reward|return|success|[fr](?=\d))\d*"
)
_NAMES_IN_MESSAGE = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric, and which way is better (None: nobody said, and the name does not tell)."""

    name: str
    direction: Direction | None


def direction_of(name: str) -> Direction | None:
    """Guess from its words which way a metric is better: "val_loss" -> "min", "top5/acc" -> "max"."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    smaller = any(_SMALLER_IS_BETTER.fullmatch(word) for word in words)
    larger = any(_LARGER_IS_BETTER.fullmatch(word) for word in words)
    if smaller == larger:
        return None
    return "min" if smaller else "max"


def all_metrics(entries: Iterable[Entry]) -> list[str]:
    """The names of all metrics, those of the newest checkpoint first, in the order they were given."""
    names: dict[str, None] = {}
    for entry in reversed(list(entries)):
        if entry.manifest is not None:
            names |= dict.fromkeys(entry.manifest.metrics)
    return list(names)


def choose_metric(text: str, known: Sequence[str], *, of: str = "checkpoint") -> Metric:
    """The metric that a user named, as NAME or NAME:min or NAME:max.

    Args:
        text: what the user said.
        known: names of metrics.
        of: what has metrics, for the message.

    Raises:
        UsageError: none of them has it; the message lists those there are.
    """
    if text in known:
        return Metric(name=text, direction=direction_of(text))
    stem, _, way = text.rpartition(":")
    if stem in known and way in ("min", "max"):
        return Metric(name=stem, direction="min" if way == "min" else "max")
    shown = ", ".join(known[:_NAMES_IN_MESSAGE]) or "none"
    more = f" and {len(known) - _NAMES_IN_MESSAGE} more" if len(known) > _NAMES_IN_MESSAGE else ""
    raise UsageError(f"no {of} here has the metric {text!r}; there are: {shown}{more}")


def merit(entry: Entry, metric: Metric) -> tuple[bool, float]:
    """Sorts entries from worst to best; those without a number, or with NaN, come first.

    Where no direction is known a larger value sorts later.
    """
    value = entry.manifest.metrics.get(metric.name) if entry.manifest else None
    if not isinstance(value, int | float) or (isinstance(value, float) and math.isnan(value)):
        return False, 0.0
    return True, -value if metric.direction == "min" else value
