"""Experiments of trivial trials: the same script on keepstep.tune and on Ray Tune, beside bare processes."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time
from typing import Any, Final, NamedTuple

from benchmarks.measure import Clock, Contender, Rounds, interleaved
from benchmarks.report import Bar, at_least, at_most, note, show_table, status
from benchmarks.settings import Settings
from benchmarks.tuning.tree import MARK, Tree, TreePeak

__all__ = ["Library", "Work", "libraries", "run", "run_script"]

_SCRIPTS: Final = Path(__file__).parent / "tuning"
_KEEPSTEP, _RAY, _FLOOR = "keepstep.tune", "ray.tune", "floor: bare processes"
_END: Final = "exited"
_LIMIT_S: Final = 900.0
_TIMES_LESS, _TIMES_LESS_SAVING, _TIMES_LESS_MEMORY, _FIRST_S = 15, 5, 3, 1.0
_CURVE, _RESTORE_S = 1.5, 5.0


class Library(NamedTuple):
    """A contender: what runs which script."""

    name: str
    python: Path
    script: str = "trials.py"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an experiment does.

    Attributes:
        name: for tables.
        trials, reports: how many; reports of each trial.
        kind: "function" or "class", whose processes take one trial after another.
        checkpoint_bytes: of each report; 0: none.
        step_s: what a trial does between reports: nothing, for so long.
        torch: whether the script uses it.
    """

    name: str
    trials: int
    reports: int
    kind: str = "function"
    checkpoint_bytes: int = 0
    step_s: float = 0.0
    torch: bool = False


def run(settings: Settings) -> list[Bar]:
    """Print the tables; return the bars."""
    bench = _Bench(settings, libraries(settings))
    size = settings.size.tuning
    full = Work(name="", trials=size.trials, reports=size.reports)
    plain = replace(full, name="functions, no checkpoints")
    saving = replace(full, name="functions, a checkpoint a report", checkpoint_bytes=size.checkpoint_bytes)
    reused = replace(full, name="classes, processes reused", kind="class")
    one = Work(name="one report", trials=1, reports=1)
    with_torch = replace(one, name="one report, script and trial use torch", torch=True)
    timed = {work.name: bench.time(work) for work in (plain, saving, reused)}
    bench.show_times(f"{size.trials} trials x {size.reports} reports, two at a time", timed)
    started = {work.name: bench.time(work) for work in (one, with_torch)}
    bench.show_firsts(started)
    peaks = bench.peaks(Work(name="memory", trials=2, reports=size.steps, step_s=size.step_s))
    bars = [
        *bench.less_time(plain.name, timed[plain.name], _TIMES_LESS),
        *bench.less_time(saving.name, timed[saving.name], _TIMES_LESS_SAVING),
        *bench.less_memory(peaks),
        *(_first(name, rounds) for name, rounds in started.items()),
    ]
    return [*bars, *_many(settings)]


def libraries(settings: Settings) -> list[Library]:
    """Who takes part."""
    ours = [Library(_KEEPSTEP, Path(sys.executable)), Library(_FLOOR, Path(sys.executable), "floor.py")]
    python = settings.ray_python or Path(sys.executable)
    asked = subprocess.run([python, "-c", "import ray.tune"], capture_output=True, check=False)
    if asked.returncode == 0:
        return [*ours, Library(_RAY, python)]
    note(
        f"Ray Tune is left out: {python} can't import it. Install it with `pip install 'keepstep[bench]'`, "
        "or name an interpreter that has it with --ray-python"
    )
    return ours


class _Bench:
    def __init__(self, settings: Settings, members: Sequence[Library]) -> None:
        self._settings = settings
        self._members = members
        self._has_ray = any(member.name == _RAY for member in members)

    def time(self, work: Work) -> Rounds:
        """One experiment after another, in turns."""
        return interleaved(
            [self._contender(member, work) for member in self._able(work)],
            self._settings.size.tuning.rounds,
            what=f"tune: {work.name}",
        )

    def _able(self, work: Work) -> list[Library]:
        """Bare processes know no classes; torch need not be where Ray is."""
        if work.kind == "class":
            return [member for member in self._members if member.name != _FLOOR]
        return [member for member in self._members if not work.torch or member.name == _KEEPSTEP]

    def _contender(self, member: Library, work: Work) -> Contender:
        place = self._settings.directory / "experiments"

        def fresh() -> None:
            place.mkdir()

        def timed(clock: Clock) -> None:
            clock.marks |= run_script(member, work, place)

        return Contender(name=member.name, run=timed, before=fresh, after=lambda: shutil.rmtree(place))

    def peaks(self, work: Work) -> Mapping[str, TreePeak]:
        """The memory of all processes while two trials run."""
        found: dict[str, TreePeak] = {}
        place = self._settings.directory / "watched"
        for member in self._members:
            with status(f"tune: memory of {member.name}"):
                place.mkdir()
                found[member.name] = _peak(member, work, place)
                shutil.rmtree(place)
        rows = [
            (name, f"{peak.rss_bytes / 1e6:.0f} MB", f"{peak.pss_bytes / 1e6:.0f} MB", str(peak.processes))
            for name, peak in found.items()
        ]
        show_table("Memory of all processes while two trials run", ("", "RSS", "PSS", "processes"), rows)
        return found

    # ---------------------------------------------------------------------------------------- what came out

    def show_times(self, title: str, timed: Mapping[str, Rounds]) -> None:
        rows = []
        for name, rounds in timed.items():
            rows += [
                (
                    f"{name}: {member.name}",
                    f"{rounds.median_s(member.name, _END):.2f} s",
                    rounds.spread(member.name, _END),
                    f"{rounds.ratio(member.name, _KEEPSTEP, _END, _END):.2f}x",
                )
                for member in self._members
                if (member.name, _END) in rounds.times
            ]
        show_table(f"{title}: start to end of the process", ("", "median", "spread", "of keepstep"), rows)

    def show_firsts(self, started: Mapping[str, Rounds]) -> None:
        rows = []
        for name, rounds in started.items():
            for member in self._members:
                if (member.name, "first") in rounds.times:
                    first, imported = (rounds.median_s(member.name, mark) for mark in ("first", "imported"))
                    after = _after_imports_s(rounds, member.name)
                    rows.append((f"{name}: {member.name}", f"{first:.2f}", f"{imported:.2f}", f"{after:.2f}"))
        columns = ("", "first result", "imports done", "first after imports")
        show_table("The first result, seconds since the process was started", columns, rows)

    def less_time(self, name: str, rounds: Rounds, times: int) -> list[Bar]:
        if not self._has_ray:
            return []
        return [
            at_least(
                f"{name}: times less than Ray Tune",
                rounds.ratio(_RAY, _KEEPSTEP, _END, _END),
                times,
                "x",
                digits=1,
            )
        ]

    def less_memory(self, peaks: Mapping[str, TreePeak]) -> list[Bar]:
        if not self._has_ray:
            return []
        ours, theirs = peaks[_KEEPSTEP], peaks[_RAY]
        kinds = (("RSS", theirs.rss_bytes / ours.rss_bytes), ("PSS", theirs.pss_bytes / ours.pss_bytes))
        return [
            at_least(f"memory ({kind}): times less than Ray Tune", ratio, _TIMES_LESS_MEMORY, "x", digits=1)
            for kind, ratio in kinds
        ]


def _first(name: str, rounds: Rounds) -> Bar:
    taken = _after_imports_s(rounds, _KEEPSTEP)
    return at_most(f"{name}: first result after the script's imports", taken, _FIRST_S, " s")


def _after_imports_s(rounds: Rounds, name: str) -> float:
    pairs = zip(rounds.times[name, "first"], rounds.times[name, "imported"], strict=True)
    return statistics.median(first - imported for first, imported in pairs)


# ------------------------------------------------------------------------------------------------- processes


def run_script(
    member: Library, work: Work, place: Path, watch: Callable[[Tree], object] | None = None
) -> dict[str, float]:
    """Run one experiment in a process of its own.

    Args:
        member: who runs it.
        work: what it does.
        place: an empty directory for what it writes.
        watch: is handed its processes before it begins.

    Returns:
        Seconds since the process was started: "imported", "first" (result), "fitted", "exited".

    Raises:
        RuntimeError: it failed; with what it said.
    """
    mark = uuid.uuid4().hex
    tree = Tree(mark)
    variables = os.environ | {MARK: mark, "RAY_USAGE_STATS_ENABLED": "0"}
    if watch is not None:
        watch(tree)
    told = asdict(work) | {"directory": str(place), "began": time()}
    command = [str(member.python), "-P", str(_SCRIPTS / member.script), member.name, json.dumps(told)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, env=variables, timeout=_LIMIT_S, check=False
        )
        exited = time() - told["began"]
    finally:
        tree.ended()
    return _said(ended, "MARKS") | {"exited": exited}


def _said(ended: subprocess.CompletedProcess[str], about: str) -> dict[str, Any]:
    for line in ended.stdout.splitlines():
        if line.startswith(f"{about} "):
            found: dict[str, Any] = json.loads(line.removeprefix(about))
            return found
    raise RuntimeError(f"{ended.args} ended with {ended.returncode}: {ended.stderr[-3000:]}")


def _peak(member: Library, work: Work, place: Path) -> TreePeak:
    watched: list[Tree] = []

    def watch(tree: Tree) -> None:
        watched.append(tree)
        tree.watch()

    run_script(member, work, place, watch)
    return watched[0].peak


# ------------------------------------------------------------------------------------------- many trials


def _many(settings: Settings) -> list[Bar]:
    trials = settings.size.tuning.many
    with status(f"tune: {trials:,} trials in one process"):
        command = [sys.executable, "-P", str(_SCRIPTS / "many.py"), str(trials), str(settings.directory)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        found = _said(ended, "MANY")
        shutil.rmtree(settings.directory / "many")
    columns = ("ms per trial", *(f"{tenth}/10" for tenth in range(1, 11)))
    rows = [
        (name, *(f"{ms:.2f}" for ms in found[key]))
        for name, key in (("on the clock", "wall_ms"), ("CPU", "cpu_ms"))
    ]
    show_table(f"{trials:,} trials of 1 ms in one process, in tenths", columns, rows)
    note(f"journal: {found['journal_bytes']:.0f} bytes a trial of one report, records of the trial with it")
    note(f"opened again: {found['restore_s']:.2f} s, of which {found['restore_cpu_s']:.2f} s CPU")
    second, last = found["cpu_ms"][1], found["cpu_ms"][-1]
    return [
        at_most("CPU per trial: last tenth beside the second", last / second, _CURVE, "x"),
        at_most(f"an experiment of {trials:,} trials opened again", found["restore_s"], _RESTORE_S, " s"),
    ]
