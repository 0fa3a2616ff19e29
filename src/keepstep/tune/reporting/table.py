"""How trials stand, as a rich table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keepstep.tune.experiment.trial import ERROR, PAUSED, PENDING, RUNNING, TERMINATED, Trial
from keepstep.tune.reporting.base import Overview
from keepstep.tune.reporting.lines import status_line
from keepstep.tune.reporting.watch import Standing, Watch
from keepstep.tune.reporting.words import cut, duration, in_one_line, parameters, value

__all__ = ["Look", "rows_of", "show"]

_STYLES: Final = {RUNNING: "green", PAUSED: "cyan", PENDING: "dim", TERMINATED: "", ERROR: "bold red"}
_PARAMETERS: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a table shows.

    Attributes:
        metrics: {name: header} of columns; None: the metric that counts and others that are reported.
        parameters: {name: header}; None: what was drawn or picked.
        max_rows: most rows of trials.
        max_errors: most lines of failures.
        max_column_length: characters of a value.
        infer_limit: most metrics if none were named.
        sort_by_metric: the best first, whatever they do; otherwise those that run first.
    """

    metrics: Mapping[str, str] | None = None
    parameters: Mapping[str, str] | None = None
    max_rows: int = 20
    max_errors: int = 20
    max_column_length: int = 20
    infer_limit: int = 3
    sort_by_metric: bool = False


def rows_of(standing: Standing, watch: Watch, look: Look) -> list[Trial]:
    """The trials to show: those that run, then the best of the others, then those that wait."""
    rest = sorted([*standing.paused, *standing.ended], key=watch.rank, reverse=True)
    if look.sort_by_metric:
        rest = sorted([*standing.running, *rest], key=watch.rank, reverse=True)
        return [*rest, *standing.pending][: look.max_rows]
    return [*standing.running, *rest, *standing.pending][: look.max_rows]


def show(overview: Overview, standing: Standing, watch: Watch, look: Look) -> RenderableType:
    """All of it."""
    rows = rows_of(standing, watch, look)
    parts: list[RenderableType] = [
        Text.assemble((in_one_line(overview.name), "bold"), "  ", status_line(overview, standing, best=False))
    ]
    if standing.best is not None and overview.metric is not None:
        best = value(standing.best.metric(overview.metric))
        parts.append(
            Text.assemble(
                ("best ", "dim"),
                f"{overview.metric} ",
                (best, "bold green"),
                f"  {standing.best}  {parameters(standing.best)}",
            )
        )
    if rows:
        parts.append(_table(rows, standing.best, watch, look))
    more = len(overview.trials) - len(rows)
    if more > 0:
        parts.append(Text(f"and {more:,} more trials in {overview.path}", "dim"))
    failed = list(standing.failed)[-look.max_errors :] if look.max_errors else []
    errors = (Text(f"{trial} {ERROR}: {cut(in_one_line(trial.error or ''), 200)}", "red") for trial in failed)
    return Group(*parts, *errors)


def _table(rows: Sequence[Trial], best: Trial | None, watch: Watch, look: Look) -> Table:
    metrics = look.metrics
    if metrics is None:
        metrics = {name: name for name in watch.metrics(rows, look.infer_limit)}
    said = look.parameters
    if said is None:
        names = dict.fromkeys(name for trial in rows for name in trial.evaluated_params)
        said = {name: name for name in list(names)[:_PARAMETERS]}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for header in said.values():
        table.add_column(cut(header, look.max_column_length), justify="right", no_wrap=True)
    table.add_column("iter", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for header in metrics.values():
        table.add_column(cut(header, look.max_column_length), justify="right", no_wrap=True)
    for trial in rows:
        style = "bold" if trial is best else _STYLES.get(trial.status, "")
        table.add_row(
            str(trial),
            f"{trial.status} ({trial.stopped_by})" if trial.stopped_by is not None else trial.status,
            *(cut(value(_parameter(trial, name)), look.max_column_length) for name in said),
            str(trial.training_iteration) if trial.last_result else "",
            duration(trial.time_total_s) if trial.last_result else "",
            *(cut(value(trial.metric(name)), look.max_column_length) for name in metrics),
            style=style,
        )
    return table


def _parameter(trial: Trial, name: str) -> object:
    if name in trial.evaluated_params:
        return trial.evaluated_params[name]
    found: object = trial.config
    for part in name.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
