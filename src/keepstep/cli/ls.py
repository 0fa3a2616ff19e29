"""`keepstep ls`: the checkpoints of a store, one a line."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.source import source_of
from keepstep.checkpoint.keeping.catalog import Entry, Problem, disk_bytes
from keepstep.cli.columns import Column, fit, render, wrapped
from keepstep.cli.locate import Found, PlaceParameter, health_of, leftovers, locate
from keepstep.cli.metrics import Metric, all_metrics, choose_metric, direction_of, merit
from keepstep.cli.output import Cell, Output, open_output, write_json, write_lines
from keepstep.cli.phrasing import age, compact, counted, exact, human_bytes, moment

__all__ = ["command"]

_ROWS_ON_TERMINAL: Final = 40
_NOTHING = Cell("-", "dim")
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """What was found, and what of it was asked for.

    Attributes:
        found: where.
        checked: every checkpoint with what is wrong with it, oldest first.
        rows: those to show, in order.
        metrics: to show, the one that was sorted by first.
        chosen: whether the metrics were named on the command line.
    """

    found: Found
    checked: Sequence[tuple[Entry, Problem | None]]
    rows: Sequence[tuple[Entry, Problem | None]]
    metrics: Sequence[Metric]
    chosen: bool

    @property
    def set_aside(self) -> int:
        """How many a resume or a scrub has moved out of the way."""
        return sum(left.kind == "damaged" for left in leftovers(self.found.root))

    @property
    def damaged(self) -> int:
        return sum(problem is not None and not problem.refused for _, problem in self.checked)

    @property
    def unreadable(self) -> int:
        """How many may well be whole: the system refuses to read them, or a newer keepstep wrote them."""
        return sum(problem is not None and problem.refused for _, problem in self.checked)


@click.command(
    name="ls",
    short_help="List the checkpoints of a store.",
    epilog="\b\nExit codes:\n  0  listed\n  2  wrong usage, nothing found, or not readable",
)
@click.argument("path", type=PlaceParameter(), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--metric", "metric_names", metavar="NAME", multiple=True, help="Show this metric alone; may be repeated."
)
@click.option(
    "--sort",
    "sort_by",
    metavar="KEY",
    help="step, created or a metric (the best last); default: oldest first.",
)
@click.option("--reverse", is_flag=True, help="Turn the list upside down.")
@click.option(
    "--last",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only the last N of the list, before --reverse; 0 is all. "
    f"Default: {_ROWS_ON_TERMINAL} on a terminal, else all.",
)
@click.option("--damaged", is_flag=True, help="Only damaged or unreadable checkpoints.")
def command(
    path: Path | str,
    as_json: bool,
    metric_names: Sequence[str],
    sort_by: str | None,
    reverse: bool,
    last: int | None,
    damaged: bool,
) -> None:
    """List the checkpoints of a store.

    PATH is a store, a project directory that holds checkpoints/, or one checkpoint; default: the current
    directory. Health is what can be seen without reading data; `keepstep verify` reads it.

    On a terminal the best value of each metric stands out. Which way is better is told by its name (loss,
    ppl ... or acc, f1 ...), or by you: NAME:min, NAME:max.

    Through a pipe nothing is cut: dates, bytes and all digits, one checkpoint a line; lines of other words
    begin with "#".
    """
    found = locate(path)
    checked = health_of(found.entries)
    known = all_metrics(found.entries)
    order = _order(sort_by, known)
    rows = sorted(
        (row for row in checked if row[1] is not None or not damaged), key=lambda row: order.key(row[0])
    )
    output = open_output()
    if last is None and not as_json and output.width is not None:
        last = _ROWS_ON_TERMINAL
    rows = rows[-last:] if last else rows
    listing = _Listing(
        found=found,
        checked=checked,
        rows=rows[::-1] if reverse else rows,
        metrics=_metrics_to_show(metric_names, order.metric, known),
        chosen=bool(metric_names),
    )
    if as_json:
        write_json(_document(listing))
    else:
        write_lines(_on_paper(listing, output) if output.width is None else _on_terminal(listing, output))


# ------------------------------------------------------------------------------------------ choose


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    key: Callable[[Entry], tuple[Any, ...]]
    metric: Metric | None = None


def _order(sort_by: str | None, known: Sequence[str]) -> _Order:
    if sort_by is None:
        return _Order(key=lambda entry: (entry.number,))
    if sort_by == "step":
        return _Order(key=_step_key)
    if sort_by == "created":
        return _Order(key=_created_key)
    metric = choose_metric(sort_by, known)
    return _Order(key=lambda entry: (*merit(entry, metric), entry.number), metric=metric)


def _step_key(entry: Entry) -> tuple[bool, int, int]:
    step = entry.manifest.step if entry.manifest else None
    return step is not None, step or 0, entry.number


def _created_key(entry: Entry) -> tuple[datetime, int]:
    created = moment(entry.manifest.created_at) if entry.manifest else None
    return created or _LONG_AGO, entry.number


def _metrics_to_show(names: Sequence[str], sorted_by: Metric | None, known: Sequence[str]) -> list[Metric]:
    chosen = [choose_metric(name, known) for name in names]
    if not chosen:
        chosen = [Metric(name=name, direction=direction_of(name)) for name in known]
    if sorted_by is not None:
        chosen = [sorted_by, *(metric for metric in chosen if metric.name != sorted_by.name)]
    return chosen


def _best(listing: _Listing, metric: Metric) -> Entry | None:
    """The soundest of the best, the newest of equals; None if it is not known which way is better."""
    sound = [entry for entry, damage in listing.checked if damage is None and merit(entry, metric)[0]]
    if metric.direction is None or not sound:
        return None
    return max(sound, key=lambda entry: (*merit(entry, metric), entry.number))


# -------------------------------------------------------------------------------------------- json


def _document(listing: _Listing) -> dict[str, Any]:
    return {
        "path": str(listing.found.root),
        "checkpoints": [_describe(entry, problem) for entry, problem in listing.rows],
        "count": len(listing.checked),
        "damaged": listing.damaged,
        "unreadable": listing.unreadable,
        "set_aside": listing.set_aside,
        "bytes_on_disk": _bytes_on_disk(listing.found),
        "bytes_free": _bytes_free(listing.found.root),
    }


def _describe(entry: Entry, problem: Problem | None) -> dict[str, Any]:
    manifest = entry.manifest
    keys = (
        "id",
        "created_at",
        "step",
        "epoch",
        "metrics",
        "tags",
        "pinned",
        "parent",
        "run",
        "attempt",
        "bytes",
    )
    return {
        "name": entry.name,
        "path": str(entry.path),
        "health": "ok" if problem is None else problem.health,
        "problem": None if problem is None else problem.reason,
        **{key: getattr(manifest, key) if manifest else None for key in keys},
    }


def _bytes_on_disk(found: Found) -> int:
    if isinstance(found.root, str):
        held: dict[Hashable, int] = {}
        for entry in found.entries:
            held |= source_of(entry.path).held(entry.manifest.files) if entry.manifest else {}
        return sum(held.values())
    if not found.is_store:
        return disk_bytes(found.root)
    return disk_bytes(
        *(entry.path for entry in found.entries if isinstance(entry.path, Path)),
        *(left.path for left in leftovers(found.root)),
    )


def _bytes_free(root: Path | str) -> int | None:
    if isinstance(root, str):
        return None  # a bucket has no end
    free = os.statvfs(root)
    return free.f_bavail * free.f_frsize


# ------------------------------------------------------------------------------------------- lines


def _on_paper(listing: _Listing, output: Output) -> Iterator[str]:
    """For pipes and files: exact, whole, one checkpoint a line."""
    columns = [
        *_columns(listing.rows, lambda m: m.created_at, lambda m: str(m.bytes), size_header="bytes"),
        *(_metric_column(listing, metric, exact) for metric in listing.metrics),
        _labels(listing.rows),
        Column(
            header="health",
            cells=[
                Cell("ok" if problem is None else f"{problem.health}: {problem.reason}")
                for _, problem in listing.rows
            ],
        ),
    ]
    yield from render(fit(columns, None), output)
    free = _bytes_free(listing.found.root)
    unreadable = f"{listing.unreadable} unreadable, " if listing.unreadable else ""
    yield (
        f"# {counted(len(listing.checked), 'checkpoint')}, {listing.damaged} damaged, {unreadable}"
        f"{listing.set_aside} set aside as damaged, "
        f"{_bytes_on_disk(listing.found)} bytes on disk" + ("" if free is None else f", {free} bytes free")
    )


def _on_terminal(listing: _Listing, output: Output) -> Iterator[str]:
    now = datetime.now(UTC)
    name, step, epoch, created, size = _columns(
        listing.rows, lambda m: age(m.created_at, now), lambda m: human_bytes(m.bytes), size_header="size"
    )
    metrics = [
        _metric_column(listing, metric, compact, rank=3 if place == 1 else 10 * (not listing.chosen) + place)
        for place, metric in enumerate(listing.metrics, start=1)
    ]
    health = Column(
        header="health",
        cells=[
            Cell("ok", "green") if problem is None else Cell(problem.health, "bold red")
            for _, problem in listing.rows
        ],
    )
    labels = [_labels(listing.rows)] if any(m.tags or m.pinned for m in _manifests(listing.rows)) else []
    fitted = fit([name, step, epoch, created, size, *metrics, *labels, health], output.width)
    problems = [(row, problem) for row, (_, problem) in enumerate(listing.rows)]
    notes = {row: [Cell(problem.reason, "red")] for row, problem in problems if problem is not None}
    yield from render(fitted, output, notes=notes)
    yield ""
    yield from wrapped(Cell(_totals(listing), "dim"), output, 0)
    for remark in _remarks(listing, fitted.left_out):
        yield from wrapped(Cell(remark, "dim"), output, 0)


def _manifests(rows: Sequence[tuple[Entry, Problem | None]]) -> Iterator[Manifest]:
    return (entry.manifest for entry, _ in rows if entry.manifest is not None)


def _columns(
    rows: Sequence[tuple[Entry, Problem | None]],
    created: Callable[[Manifest], str],
    size: Callable[[Manifest], str],
    size_header: str,
) -> list[Column]:
    """Name, step, epoch, when and how large."""

    def cells(value: Callable[[Manifest], Any], style: str = "") -> list[Cell]:
        texts = [value(entry.manifest) if entry.manifest else None for entry, _ in rows]
        return [_NOTHING if text is None else Cell(str(text), style) for text in texts]

    return [
        Column(header="name", cells=[Cell(entry.name, "bold") for entry, _ in rows]),
        Column(header="step", cells=cells(lambda m: m.step), right=True, rank=2),
        Column(header="epoch", cells=cells(lambda m: m.epoch), right=True, rank=8),
        Column(header="created", cells=cells(created, "dim"), right=size_header == "size", rank=6),
        Column(header=size_header, cells=cells(size), right=True, rank=7),
    ]


def _metric_column(
    listing: _Listing, metric: Metric, number: Callable[[float | int | str | bool], str], rank: int = 0
) -> Column:
    best = _best(listing, metric)
    cells = []
    for entry, _ in listing.rows:
        value = entry.manifest.metrics.get(metric.name) if entry.manifest else None
        style = "bold green" if entry is best else ""
        cells.append(_NOTHING if value is None else Cell(number(value), style))
    return Column(header=metric.name, cells=cells, right=True, rank=rank, least=10)


def _labels(rows: Sequence[tuple[Entry, Problem | None]]) -> Column:
    cells = []
    for entry, _ in rows:
        manifest = entry.manifest
        words = [*(["pinned"] if manifest.pinned else []), *manifest.tags] if manifest else []
        cells.append(Cell(",".join(words), "cyan") if words else _NOTHING)
    return Column(header="tags", cells=cells, rank=5, least=20)


def _totals(listing: _Listing) -> str:
    parts = [counted(len(listing.checked), "checkpoint")]
    parts += [f"{listing.damaged} damaged"] if listing.damaged else []
    parts += [f"{listing.unreadable} unreadable"] if listing.unreadable else []
    parts += [f"{listing.set_aside} set aside as damaged"] if listing.set_aside else []
    parts.append(f"{human_bytes(_bytes_on_disk(listing.found))} on disk")
    free = _bytes_free(listing.found.root)
    parts += [] if free is None else [f"{human_bytes(free)} free"]
    return " · ".join(parts)


def _remarks(listing: _Listing, left_out: Sequence[str]) -> Iterator[str]:
    """What a reader would miss: rows, columns and the best that are not in sight."""
    if not listing.rows:
        yield "none of them is damaged as far as can be seen without reading data; keepstep verify reads it"
        return
    if len(listing.rows) < len(listing.checked):
        yield f"{len(listing.rows):,} of {len(listing.checked):,} shown; --last 0 shows all"
    shown = {entry.path for entry, _ in listing.rows}
    if listing.metrics and (best := _best(listing, listing.metrics[0])) and best.path not in shown:
        name = listing.metrics[0].name
        value: Mapping[str, Any] = best.manifest.metrics if best.manifest else {}
        yield f"best {name}: {compact(value[name])} in {best.name}"
    if left_out:
        yield f"no room for {', '.join(left_out)}; --metric NAME shows that metric, --json everything"
