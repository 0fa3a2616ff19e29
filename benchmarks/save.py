"""How long a durable save takes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.floors import Floors
from benchmarks.machine import cool, warm
from benchmarks.measure import Clock, Contender, Rounds, interleaved
from benchmarks.methods import Method, fsync_all, methods, remove
from benchmarks.report import Bar, at_least, at_most, show_table
from benchmarks.settings import Settings
from benchmarks.workload import TrainingState

__all__ = ["run"]

_FLOOR = "floor: O_DIRECT, 2 threads"


def run(settings: Settings) -> list[Bar]:
    """Print both tables; return the bars."""
    state = TrainingState(settings.size)
    floors = Floors(state.tensors())
    path = settings.directory / "floor.bin"
    floor = Contender(
        name=_FLOOR,
        run=lambda _: floors.write(path, 2),
        before=lambda: remove(path),
        after=lambda: remove(path),
    )
    saves = [
        _save_contender(method, settings.directory, state)
        for method in methods(state)
        if not method.load_only
    ]
    everyone = [*saves, floor]
    warm_rounds = interleaved(
        everyone, settings.size.rounds, what="durable save", settle=lambda: warm(state.bytes)
    )
    _show_durable("free memory warm", warm_rounds, everyone, state.bytes)
    few = [contender for contender in everyone if contender.name in ("accelerate", "keepstep", _FLOOR)]
    cold_rounds = interleaved(
        few, settings.size.cold_rounds, what="durable save, cold", settle=lambda: cool(settings.size.cold_s)
    )
    _show_durable(f"free memory untouched for {settings.size.cold_s:g} s", cold_rounds, few, state.bytes)
    return [
        bar
        for memory, rounds in (("warm", warm_rounds), ("cold", cold_rounds))
        for bar in (
            at_least(f"durable save, {memory}: x accelerate", rounds.ratio("accelerate", "keepstep"), 4, "x"),
            at_most(f"durable save, {memory}: x floor", rounds.ratio("keepstep", _FLOOR), 1.3, "x"),
        )
    ]


def _save_contender(method: Method, directory: Path, state: TrainingState) -> Contender:
    path = directory / "saved"

    def before() -> None:
        remove(path)
        state.advance()

    def timed(clock: Clock) -> None:
        method.save(path)
        clock.mark("returned")
        if not method.durable:
            fsync_all(path)

    return Contender(name=method.name, run=timed, before=before, after=lambda: remove(path))


def _show_durable(memory: str, rounds: Rounds, contenders: list[Contender], size_bytes: int) -> None:
    rows = []
    for name in (contender.name for contender in contenders):
        returned = "returned" if (name, "returned") in rounds.times else "done"
        durable = rounds.median_s(name)
        rows.append(
            (
                name,
                f"{rounds.median_s(name, returned):.2f}",
                f"{durable:.2f}",
                rounds.spread(name),
                f"{size_bytes / durable / 1e9:.2f}",
                f"{rounds.ratio(name, 'keepstep'):.2f}",
                f"{rounds.ratio(name, _FLOOR):.2f}",
            )
        )
    columns = ("durable save", "returns s", "durable s", "spread s", "GB/s", "x keepstep", "x floor")
    title = f"Save {size_bytes / 1e9:.2f} GB, {memory}; keepstep's time holds hash, fsync and commit"
    show_table(title, columns, rows)
