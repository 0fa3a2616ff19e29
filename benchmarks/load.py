"""How long it takes to restore live objects, and how much memory saving and loading take on top."""

from __future__ import annotations

from pathlib import Path

from benchmarks.floors import Floors
from benchmarks.machine import warm
from benchmarks.measure import Contender, Rounds, interleaved
from benchmarks.memory import Peak, peak_of
from benchmarks.methods import DCP, Method, methods, remove
from benchmarks.report import Bar, at_least, at_most, note, show_table, status
from benchmarks.settings import Settings
from benchmarks.workload import TrainingState

__all__ = ["run"]

_FLOOR = "floor: read, 2 threads"
_MEMORY_LIMIT_MB = 256
_MB = 1e6


def run(settings: Settings) -> list[Bar]:
    """Print both tables; return the bars."""
    state = TrainingState(settings.size)
    everyone = methods(state)
    places = {method.name: settings.directory / method.name.replace(" ", "-") for method in everyone}
    expected = state.digest()
    try:
        for method in everyone:
            with status(f"load: saving for {method.name}"):
                method.save(places[method.name])
        bars = _warm(settings, state, everyone, places, expected)
        del state
        return bars + _memory(settings, everyone, places)
    finally:
        for place in places.values():
            remove(place)


# ------------------------------------------------------------------------------------------ time


def _warm(
    settings: Settings, state: TrainingState, everyone: list[Method], places: dict[str, Path], expected: str
) -> list[Bar]:
    floor_path = settings.directory / "floor.bin"
    floors = Floors(state.tensors())
    try:
        floors.write_buffered(floor_path)
        for method in everyone:
            with status(f"load: warming {method.name}"):
                _load_and_compare(method, places[method.name], state, expected)
        loads = [
            Contender(
                name=method.name,
                run=lambda _, method=method: method.load(places[method.name]),  # type: ignore[misc]
                after=state.reseat,
            )
            for method in everyone
        ]
        floor = Contender(name=_FLOOR, run=lambda _: floors.read(floor_path, 2))
        rounds = interleaved(
            [*loads, floor], settings.size.rounds, what="warm load", settle=lambda: warm(state.bytes)
        )
    finally:
        remove(floor_path)
    _show(rounds, [c.name for c in (*loads, floor)], state.bytes)
    return [
        at_least("warm load: times faster than dcp.load", rounds.ratio("dcp", "keepstep"), 1, "x"),
        at_least("warm load: times faster than dcp.load, 2 threads", rounds.ratio(DCP, "keepstep"), 1, "x"),
    ]


def _load_and_compare(method: Method, place: Path, state: TrainingState, expected: str) -> None:
    """Load once, which warms the page cache, and see that everything is back."""
    state.spoil()
    method.load(place)
    found = state.digest()
    state.reseat()
    if found != expected:
        raise AssertionError(f"{method.name} did not restore the state: digest {found}, expected {expected}")


def _show(rounds: Rounds, names: list[str], size_bytes: int) -> None:
    rows = [
        (
            name,
            f"{rounds.median_s(name):.3f}",
            rounds.spread(name),
            f"{size_bytes / rounds.median_s(name) / 1e9:.2f}",
            f"{rounds.ratio(name, 'keepstep'):.2f}",
        )
        for name in names
    ]
    columns = ("warm load into live objects", "s", "spread s", "GB/s", "x keepstep")
    show_table(f"Load {size_bytes / 1e9:.2f} GB; only keepstep verifies what it reads", columns, rows)
    note("torch (mmap) leaves the optimizer's state on disk: it is read, and copied, by the next step.")


# ---------------------------------------------------------------------------------------- memory


def _memory(settings: Settings, everyone: list[Method], places: dict[str, Path]) -> list[Bar]:
    peaks: dict[tuple[str, str], Peak] = {}
    wanted = [("load", method.name) for method in everyone]
    wanted += [("save", "torch"), ("save", DCP), ("save", "keepstep"), ("background", "keepstep")]
    for operation, name in wanted:
        with status(f"memory: {operation} by {name}"):
            place = places[name] if operation == "load" else settings.directory / "probed"
            peaks[operation, name] = peak_of(operation, name, place, settings.size)
    rows = []
    for (operation, name), peak in peaks.items():
        share = peak.above_bytes / peak.state_bytes
        rows.append((f"{operation}: {name}", f"{peak.above_bytes / _MB:.0f}", f"{share:.2f}"))
    columns = ("fresh process", "peak above the live state, MB", "x state")
    show_table("Memory (anonymous and shared, not the page cache)", columns, rows)
    budget = settings.size.memory_budget_bytes / _MB
    return [
        _memory_bar("load_into", peaks["load", "keepstep"], 0),
        _memory_bar("store.save", peaks["save", "keepstep"], 0),
        _memory_bar(f"save_in_background, budget {budget:.0f} MB", peaks["background", "keepstep"], budget),
    ]


def _memory_bar(name: str, peak: Peak, budget_mb: float) -> Bar:
    limit = _MEMORY_LIMIT_MB + budget_mb
    return at_most(f"peak memory: {name}", peak.above_bytes / _MB, limit, " MB", digits=0)
