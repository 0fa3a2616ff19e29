"""Experiments and trials as lines and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from keepstep.cli.columns import Column, fit, render, render_pairs, wrapped
from keepstep.cli.experiments import Experiment
from keepstep.cli.output import Cell, Output
from keepstep.cli.phrasing import age, compact, counted, exact, human_bytes
from keepstep.errors import KeepstepError
from keepstep.tune.experiment.trial import CheckpointRecord, Trial
from keepstep.tune.logger.encoding import row_of
from keepstep.tune.result import AUTOMATIC_FIELDS

__all__ = [
    "NOTHING",
    "about",
    "best_of",
    "cell",
    "describe",
    "describe_checkpoint",
    "describe_experiment",
    "experiment_lines",
    "shown_lines",
    "trial_lines",
]

NOTHING: Final = Cell("-", "dim")
_RESULTS_SHOWN: Final = 5
_STYLES: Final = {"RUNNING": "green", "PAUSED": "cyan", "PENDING": "dim", "ERROR": "bold red"}


def about(experiment: Experiment) -> dict[str, Any]:
    """An experiment as JSON, without its trials."""
    return {
        "path": experiment.history.path,
        "name": experiment.name,
        "trainable": experiment.history.made.trainable,
        "state": experiment.state,
        "metric": experiment.spec.get("metric"),
        "mode": experiment.spec.get("mode"),
        "counts": experiment.counts,
        "updated_at": _when(experiment.updated_s),
    }


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def describe(trial: Trial) -> dict[str, Any]:
    """A trial as JSON."""
    newest = trial.checkpoints[-1] if trial.checkpoints else None
    return {
        "trial_id": trial.trial_id,
        "number": trial.number,
        "name": str(trial),
        "status": trial.status,
        "ended_by": trial.ended_by,
        "iteration": trial.iteration,
        "time_total_s": trial.time_total_s,
        "config": trial.config,
        "evaluated_params": trial.evaluated_params,
        "last_result": trial.last_result,
        "checkpoint": f"{trial.path}/{newest.name}" if newest is not None else None,
        "failures": trial.num_failures,
        "error": trial.error,
        "path": trial.path,
    }


def describe_experiment(place: Path, found: Experiment | KeepstepError) -> dict[str, Any]:
    """One of several experiments as JSON."""
    if isinstance(found, KeepstepError):
        return {"path": str(place.resolve()), "name": place.name, "problem": str(found)}
    return {**about(found), "problem": None, "best": best_of(found)}


def best_of(experiment: Experiment) -> dict[str, Any] | None:
    """The best trial by the experiment's own metric, as JSON; None: there is no telling."""
    metric = experiment.metric(None)
    if metric is None or metric.direction is None:
        return None
    best = experiment.best(metric.name, metric.direction)
    return {"trial_id": best[0].trial_id, "value": best[1]} if best is not None else None


def experiment_lines(
    found: Sequence[tuple[Path, Experiment | KeepstepError]], output: Output
) -> Iterator[str]:
    """One line for each experiment."""
    rows = [_experiment_row(place, one, output) for place, one in found]
    notes = {
        row: [Cell(str(one), "red")] for row, (_, one) in enumerate(found) if isinstance(one, KeepstepError)
    }
    heads = ("name", "state", "trials", "terminated", "error", "best", "updated")
    columns = [
        Column(header=head, cells=[row[place] for row in rows], right=place in (2, 3, 4), rank=rank)
        for place, (head, rank) in enumerate(zip(heads, (0, 1, 2, 5, 3, 4, 6), strict=True))
    ]
    yield from render(fit(columns, output.width), output, notes=notes)


def _experiment_row(place: Path, found: Experiment | KeepstepError, output: Output) -> list[Cell]:
    if isinstance(found, KeepstepError):
        return [Cell(place.name, "bold"), Cell("damaged", "bold red"), *[NOTHING] * 5]
    paper = output.width is None
    best, failed = best_of(found), found.counts.get("ERROR", 0)
    value = (exact if paper else compact)(best["value"]) if best is not None else ""
    when = _when(found.updated_s)
    return [
        Cell(place.name, "bold"),
        Cell(found.state, "" if found.history.ended else "green"),
        Cell(str(len(found.trials))),
        Cell(str(found.counts.get("TERMINATED", 0))),
        Cell(str(failed), "red" if failed else ""),
        Cell(f"{found.spec.get('metric')}={value}") if best is not None else NOTHING,
        Cell(when if paper else age(when, datetime.now(UTC)), "dim"),
    ]


def trial_lines(
    experiment: Experiment, trials: Sequence[Trial], metrics: Sequence[str], output: Output
) -> Iterator[str]:
    """One line for each trial, and one for all."""
    notes = {
        row: [Cell(trial.error, "red")] for row, trial in enumerate(trials) if trial.error and output.width
    }
    fitted = fit(_columns(experiment, trials, metrics, output), output.width)
    yield from render(fitted, output, notes=notes)
    told = ", ".join(f"{count} {status.lower()}" for status, count in sorted(experiment.counts.items()))
    if output.width is not None:
        yield ""
    mark = "# " if output.width is None else ""
    line = f"{mark}{counted(len(experiment.trials), 'trial')}: {told or 'none'}; {experiment.state}"
    yield from wrapped(Cell(line, "dim"), output, 0)
    if output.width is not None and len(trials) < len(experiment.trials):
        yield from wrapped(Cell(f"{len(trials):,} shown; --last 0 shows all", "dim"), output, 0)
    if fitted.left_out:
        words = f"no room for {', '.join(fitted.left_out)}; --json shows everything"
        yield from wrapped(Cell(words, "dim"), output, 0)


def _columns(
    experiment: Experiment, trials: Sequence[Trial], metrics: Sequence[str], output: Output
) -> list[Column]:
    def right(header: str, cells: Sequence[Cell], rank: int) -> Column:
        return Column(header=header, cells=cells, right=True, rank=rank)

    number_of = exact if output.width is None else compact
    params = list(dict.fromkeys(name for trial in trials for name in trial.evaluated_params))
    best = best_of(experiment)
    columns = [
        Column(header="trial", cells=[Cell(str(trial), "bold") for trial in trials]),
        Column(header="status", cells=[Cell(t.status, _STYLES.get(t.status, "")) for t in trials], rank=1),
        Column(header="ended by", cells=[cell(t.ended_by, str) for t in trials], rank=6),
        right("iter", [Cell(str(t.iteration)) for t in trials], 2),
        right("time", [Cell(f"{t.time_total_s:.4g}") for t in trials], 7),
    ]
    for place, name in enumerate(params):
        columns.append(right(name, [cell(t.evaluated_params.get(name)) for t in trials], 20 + place))
    for place, name in enumerate(metrics):
        marked = "bold green" if place == 0 else ""
        cells = [
            cell(t.metric(name), number_of, marked if best and t.trial_id == best["trial_id"] else "")
            for t in trials
        ]
        columns.append(right(name, cells, 10 + place if place else 3))
    columns.append(right("checkpoints", [Cell(str(len(t.checkpoints))) for t in trials], 8))
    return columns


def cell(value: Any, number_of: Any = compact, style: str = "") -> Cell:
    """A value, or that there is none."""
    return NOTHING if value is None else Cell(number_of(value), style)


def describe_checkpoint(trial: Trial, made: CheckpointRecord) -> dict[str, Any]:
    """A checkpoint as JSON."""
    return {
        "name": made.name,
        "path": f"{trial.path}/{made.name}",
        "iteration": made.iteration,
        "bytes": made.bytes,
        "metrics": dict(made.metrics),
    }


def shown_lines(trial: Trial, results: Sequence[Mapping[str, Any]], output: Output) -> Iterator[str]:
    """All there is to say of one trial."""
    number_of = exact if output.width is None else compact
    pairs = [
        ("trial", Cell(str(trial), "bold")),
        ("status", Cell(trial.status, _STYLES.get(trial.status, ""))),
        ("ended by", cell(trial.ended_by, str)),
        ("iteration", Cell(str(trial.iteration))),
        ("time", Cell(f"{trial.time_total_s:.4g} s")),
        ("starts", Cell(f"{trial.starts}, {counted(trial.num_failures, 'failure')}")),
        ("path", Cell(trial.path)),
    ]
    pairs += [("error", Cell(trial.error, "red"))] if trial.error else []
    yield from render_pairs(pairs, output)
    config = row_of({"of": trial.config})
    yield from _titled("configuration", output)
    yield from render_pairs(
        [(name.removeprefix("of/"), cell(value, number_of)) for name, value in config.items()],
        output,
        indent=2,
    )
    rows = [row_of(result) for result in results[-_RESULTS_SHOWN:]]
    if rows:
        yield from _titled(f"last {len(rows)} of {counted(len(results), 'result')}", output)
        yield from _results(rows, number_of, output)
    if trial.checkpoints:
        yield from _titled(counted(len(trial.checkpoints), "checkpoint"), output)
        yield from _checkpoints(trial, number_of, output)


def _titled(title: str, output: Output) -> Iterator[str]:
    yield ""
    yield output.paint(Cell(title, "dim"))


def _results(rows: Sequence[Mapping[str, Any]], number_of: Any, output: Output) -> Iterator[str]:
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in AUTOMATIC_FIELDS and not name.startswith("config/")
    ]
    shown = ["training_iteration", "time_total_s", *names]
    columns = [
        Column(header=name, cells=[cell(row.get(name), number_of) for row in rows], right=True, rank=place)
        for place, name in enumerate(shown)
    ]
    yield from render(fit(columns, output.width), output, indent=2)


def _checkpoints(trial: Trial, number_of: Any, output: Output) -> Iterator[str]:
    made = trial.checkpoints
    names = list(dict.fromkeys(name for one in made for name in row_of(one.metrics)))
    size = str if output.width is None else human_bytes
    columns = [
        Column(header="name", cells=[Cell(one.name, "bold") for one in made]),
        Column(header="iteration", cells=[Cell(str(one.iteration)) for one in made], right=True, rank=1),
        Column(header="size", cells=[Cell(size(one.bytes)) for one in made], right=True, rank=2),
        *(
            Column(
                header=name,
                cells=[cell(row_of(one.metrics).get(name), number_of) for one in made],
                right=True,
                rank=10 + place,
            )
            for place, name in enumerate(name for name in names if name not in AUTOMATIC_FIELDS)
        ),
    ]
    yield from render(fit(columns, output.width), output, indent=2)
