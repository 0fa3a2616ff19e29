"""`keepstep tune`: what the journals of experiments say, while they run and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from keepstep.cli.columns import render_pairs
from keepstep.cli.experiments import Experiment, experiments_below, find_trial, is_experiment, open_experiment
from keepstep.cli.locate import PlaceParameter
from keepstep.cli.metrics import Metric, direction_of
from keepstep.cli.output import Cell, open_output, write_json, write_lines
from keepstep.cli.phrasing import compact, exact
from keepstep.cli.trials import (
    NOTHING,
    about,
    cell,
    describe,
    describe_checkpoint,
    describe_experiment,
    experiment_lines,
    shown_lines,
    trial_lines,
)
from keepstep.errors import NoResultError, UsageError
from keepstep.tune.experiment.trial import CheckpointRecord, Trial
from keepstep.tune.logger.encoding import row_of
from keepstep.tune.ranking import SCOPES, number

__all__ = ["command"]

_ROWS_ON_TERMINAL: Final = 40
_EXIT_CODES: Final = "\b\nExit codes:\n  0  shown\n  2  wrong usage, nothing found, or not readable"


@click.group(
    name="tune",
    short_help="List experiments and trials, show one, find the best.",
    epilog=_EXIT_CODES,
)
def command() -> None:
    """List experiments and trials, show one, find the best.

    Only journals are read, so an experiment may be looked at while it runs.
    """


# --------------------------------------------------------------------------------------------- ls


@command.command(name="ls", short_help="List experiments, or the trials of one.", epilog=_EXIT_CODES)
@click.argument("path", type=PlaceParameter(), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--metric", metavar="NAME", multiple=True, help="Show this metric alone; may be repeated.")
@click.option("--sort", "sort_by", metavar="NAME", help="By this metric (the best last); default: as made.")
@click.option("--status", metavar="STATUS", help="Only trials that are RUNNING, TERMINATED, ERROR ...")
@click.option(
    "--last",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"Only the last N trials; 0 is all. Default: {_ROWS_ON_TERMINAL} on a terminal, else all.",
)
def ls_command(
    path: Path | str,
    as_json: bool,
    metric: Sequence[str],
    sort_by: str | None,
    status: str | None,
    last: int | None,
) -> None:
    """List the trials of an experiment, or the experiments in a directory.

    PATH is an experiment's directory, its address in a bucket, or a directory of experiments.
    """
    output = open_output()
    if not isinstance(path, str) and not is_experiment(path):
        found = experiments_below(path)
        if as_json:
            listed = [describe_experiment(place, one) for place, one in found]
            write_json({"path": str(path.resolve()), "experiments": listed})
        else:
            write_lines(experiment_lines(found, output))
        return
    experiment = open_experiment(path)
    trials = _chosen(experiment, sort_by, status)
    if last is None and not as_json and output.width is not None:
        last = _ROWS_ON_TERMINAL
    trials = trials[-last:] if last else trials
    if as_json:
        write_json({**about(experiment), "trials": [describe(trial) for trial in trials]})
        return
    names = [_known(experiment, said).name for said in metric] or experiment.metric_names
    write_lines(trial_lines(experiment, trials, names, output))


def _known(experiment: Experiment, said: str) -> Metric:
    found = experiment.metric(said)
    assert found is not None
    return found


def _chosen(experiment: Experiment, sort_by: str | None, status: str | None) -> list[Trial]:
    trials = experiment.trials
    if status is not None:
        known = sorted(experiment.counts)
        if status.upper() not in known:
            raise UsageError(f"no trial is {status!r}; they are: {', '.join(known) or 'none'}")
        trials = [trial for trial in trials if trial.status == status.upper()]
    if sort_by is None:
        return trials
    metric = _known(experiment, sort_by)
    sign = -1.0 if metric.direction == "min" else 1.0

    def merit(trial: Trial) -> tuple[bool, float]:
        value = number(trial.metric(metric.name))
        sound = value is not None and value == value
        return sound, sign * value if sound and value is not None else 0.0

    return sorted(trials, key=merit)


# ------------------------------------------------------------------------------------------- show


@command.command(name="show", short_help="Show everything that is known of one trial.", epilog=_EXIT_CODES)
@click.argument("path", type=PlaceParameter())
@click.argument("trial", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with all results.")
def show_command(path: Path | str, trial: str | None, as_json: bool) -> None:
    """Show the configuration, last results and checkpoints of a trial.

    PATH is the trial's directory; or the experiment's, and TRIAL the trial's id, number, name or directory.
    """
    experiment, found = find_trial(path, trial)
    results = experiment.results_of(found)
    if as_json:
        checkpoints = [describe_checkpoint(found, made) for made in found.checkpoints]
        write_json({**describe(found), "results": results, "checkpoints": checkpoints})
    else:
        write_lines(shown_lines(found, results, open_output()))


# ------------------------------------------------------------------------------------------- best


@command.command(name="best", short_help="Find the best trial, and its checkpoint.", epilog=_EXIT_CODES)
@click.argument("path", type=PlaceParameter())
@click.option("--metric", metavar="NAME", help="NAME, NAME:min or NAME:max; default: the experiment's.")
@click.option(
    "--scope",
    type=click.Choice(list(SCOPES)),
    default="last",
    help="By the last result (the default), the best, or a mean.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def best_command(path: Path | str, metric: str | None, scope: str, as_json: bool) -> None:
    """Find the best trial of an experiment, and the checkpoint to take.

    That is its kept checkpoint with the best value, or the newest one if none was saved with the metric.
    """
    experiment = open_experiment(path)
    chosen = experiment.metric(metric)
    if chosen is None:
        names = ", ".join(experiment.metric_names[:20]) or "none"
        raise UsageError(f"the experiment has no metric of its own; pass --metric NAME, one of: {names}")
    direction = chosen.direction if chosen.direction is not None else direction_of(chosen.name)
    if direction is None:
        raise UsageError(
            f"the name {chosen.name!r} does not tell which way is better; pass --metric {chosen.name}:min or "
            f"{chosen.name}:max"
        )
    best = experiment.best(chosen.name, direction, scope)
    if best is None:
        raise NoResultError(f"no trial of {experiment.history.path} has a finite number for {chosen.name!r}")
    trial, value = best
    made = _checkpoint_of(trial, chosen.name, direction)
    at = f"{trial.path}/{made.name}" if made is not None else None
    if as_json:
        said = {"metric": chosen.name, "mode": direction, "scope": scope, "value": value}
        write_json({**describe(trial), **said, "checkpoint": at})
        return
    output = open_output()
    pairs = [
        ("trial", Cell(str(trial), "bold")),
        (chosen.name, Cell((exact if output.width is None else compact)(value), "bold green")),
        ("iteration", Cell(str(trial.iteration))),
        *((name, cell(found)) for name, found in row_of(trial.evaluated_params).items()),
        ("checkpoint", Cell(at) if at is not None else NOTHING),
        ("path", Cell(trial.path)),
    ]
    write_lines(render_pairs(pairs, output))


def _checkpoint_of(trial: Trial, name: str, direction: str) -> CheckpointRecord | None:
    rated = []
    for made in trial.checkpoints:
        value = number(row_of(made.metrics).get(name))
        if value is not None and value == value:
            rated.append((value if direction == "max" else -value, made.iteration, made))
    newest = trial.checkpoints[-1] if trial.checkpoints else None
    return max(rated, key=lambda item: item[:2])[2] if rated else newest
