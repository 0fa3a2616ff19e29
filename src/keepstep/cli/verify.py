"""`keepstep verify`: read checkpoints whole and compare every byte's digest with what was committed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from keepstep.checkpoint.format.source import place_exists, source_of
from keepstep.checkpoint.keeping.catalog import Entry
from keepstep.checkpoint.keeping.verify import FileState, Report, verify_checkpoint
from keepstep.cli.columns import wrapped
from keepstep.cli.locate import Leftover, PlaceParameter, all_set_aside, choose, leftovers, locate
from keepstep.cli.output import Cell, Output, open_bar, open_output, write_json
from keepstep.cli.phrasing import counted, human_bytes

__all__ = ["command"]

_DAMAGED = 1
_UNREADABLE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What a run of the command found out.

    Attributes:
        reports: one for each checkpoint; those deleted meanwhile are left out.
        elapsed_s: time that it took.
    """

    reports: Sequence[Report]
    elapsed_s: float

    @property
    def damaged(self) -> int:
        return sum(not report.sound and not report.refused for report in self.reports)

    @property
    def unreadable(self) -> int:
        return sum(report.refused for report in self.reports)

    @property
    def bytes_read(self) -> int:
        return sum(report.bytes for report in self.reports)


@click.command(
    name="verify",
    short_help="Read checkpoints whole and say whether every byte is what was committed.",
    epilog="\b\nExit codes:\n"
    "  0  all sound\n"
    "  1  something is damaged, or all checkpoints were set aside as damaged\n"
    "  2  wrong usage, nothing found, or not readable",
)
@click.argument("path", type=PlaceParameter(), default=".")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--quick", is_flag=True, help="Read manifests, state.json and file sizes only, no data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(path: Path | str, names: Sequence[str], quick: bool, as_json: bool) -> None:
    """Read checkpoints whole and say whether every byte is what was committed.

    PATH is a store, a project directory that holds checkpoints/, or one checkpoint; default: the current
    directory. NAMEs pick checkpoints of a store (checkpoint_12, or 12); default: all of them. A file that
    several of them share is read once. What else lies in a store (unfinished saves, checkpoints set aside as
    damaged) is mentioned, and changes no exit code unless no checkpoint is left beside it.
    """
    found = locate(path, or_set_aside=True)
    entries = choose(found, names) if names else found.entries
    output = open_output()
    line = _lines_for(entries, output)
    outcome = _verify(entries, quick, None if as_json else line)
    others = leftovers(found.root) if found.is_store else []
    if as_json:
        write_json(_document(found.root, quick, outcome, others))
    else:
        for text in _summary(outcome, others, found.root, output):
            click.echo(text)
        if not entries:
            click.echo(f"keepstep: {all_set_aside(found)}", err=True)
    if outcome.damaged or not entries:
        click.get_current_context().exit(_DAMAGED)
    if outcome.unreadable:
        unread = counted(outcome.unreadable, "checkpoint")
        click.echo(f"keepstep: {unread} could not be read, and may well be whole", err=True)
        click.get_current_context().exit(_UNREADABLE)


def _verify(
    entries: Sequence[Entry], quick: bool, lines: Callable[[Report], Iterator[str]] | None
) -> _Outcome:
    """Verify in order; each report's lines are written as soon as it is known."""
    began = time.monotonic()
    sizes = [entry.manifest.bytes if entry.manifest else 0 for entry in entries]
    reports = []
    known: set[FileState] = set()
    bar = None if quick else open_bar(sum(sizes), sys.stdout if lines else sys.stderr)
    with bar or contextlib.nullcontext():
        write: Callable[[str], None] = bar.write if bar else click.echo
        for entry, size in zip(entries, sizes, strict=True):
            if bar is not None:
                bar.show(entry.name)
            report = verify_checkpoint(
                entry.path, quick=quick, progress=bar.advance if bar else lambda _: None, known=known
            )
            if not report.sound and not place_exists(entry.path):
                continue  # a training run pruned it while we looked: no damage
            if bar is not None:
                bar.advance(size - report.bytes)
            reports.append(report)
            for text in lines(report) if lines else ():
                write(text)
    return _Outcome(reports=reports, elapsed_s=time.monotonic() - began)


def _document(root: Path | str, quick: bool, outcome: _Outcome, others: Sequence[Leftover]) -> dict[str, Any]:
    return {
        "path": str(root),
        "quick": quick,
        "checkpoints": [
            {
                "name": source_of(report.path).name,
                "path": str(report.path),
                "sound": report.sound,
                "refused": report.refused,
                "problems": report.problems,
                "bytes_read": report.bytes,
            }
            for report in outcome.reports
        ],
        "count": len(outcome.reports),
        "damaged": outcome.damaged,
        "unreadable": outcome.unreadable,
        "leftovers": [{"path": str(other.path), "kind": other.kind} for other in others],
    }


def _lines_for(entries: Sequence[Entry], output: Output) -> Callable[[Report], Iterator[str]]:
    """How a report reads: one line, and on a terminal a line below for each problem."""
    longest = max((len(Cell(entry.name).text) for entry in entries), default=0)

    def lines(report: Report) -> Iterator[str]:
        name = Cell(source_of(report.path).name, "bold")
        start = output.paint(name) + " " * (longest - len(name.text) + 2)
        health = "unreadable" if report.refused else "damaged"
        if report.sound:
            yield start + output.paint(Cell("ok", "green"))
        elif output.width is None:
            yield start + Cell(f"{health}: {'; '.join(report.problems)}").text
        else:
            yield start + output.paint(Cell(health, "bold red"))
            for problem in report.problems:
                yield from wrapped(Cell(problem, "red"), output, 4)

    return lines


def _summary(
    outcome: _Outcome, others: Sequence[Leftover], root: Path | str, output: Output
) -> Iterator[str]:
    sound = len(outcome.reports) - outcome.damaged - outcome.unreadable
    parts = [f"{counted(sound, 'checkpoint')} sound", f"{outcome.damaged:,} damaged"]
    parts += [f"{outcome.unreadable:,} unreadable"] if outcome.unreadable else []
    if outcome.bytes_read:
        speed = human_bytes(int(outcome.bytes_read / max(outcome.elapsed_s, 1e-3)))
        parts.append(f"{human_bytes(outcome.bytes_read)} read in {outcome.elapsed_s:.2f} s ({speed}/s)")
    remarks = [f"{other.path.relative_to(root)}: {other.meaning}" for other in others]
    if output.width is None:
        yield from (Cell(f"# {remark}").text for remark in remarks)
        yield f"# {', '.join(parts)}"
        return
    yield ""
    for remark in remarks:
        yield from wrapped(Cell(remark, "yellow"), output, 0)
    yield from wrapped(Cell(" · ".join(parts), "dim"), output, 0)
