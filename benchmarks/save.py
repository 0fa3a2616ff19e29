"""How long a durable save takes, and how long a save in the background blocks the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from benchmarks.floors import Floors
from benchmarks.machine import cool, warm
from benchmarks.measure import Clock, Contender, Rounds, interleaved
from benchmarks.methods import Method, dcp_state_dict, fsync_all, methods, remove
from benchmarks.report import Bar, at_least, at_most, show_table
from benchmarks.settings import Settings
from benchmarks.workload import TrainingState
from keepstep.checkpoint.store import Store

__all__ = ["run"]

_FLOOR = "floor: O_DIRECT, 2 threads"
_FRESH = "keepstep, first save"
_REUSED = "keepstep, later saves"
_MEMCPY = "floor: memcpy, 1 thread"


def run(settings: Settings) -> list[Bar]:
    """Print both tables; return the bars."""
    state = TrainingState(settings.size)
    floors = Floors(state.tensors())
    return [*_durable(settings, state, floors), *_blocked(settings, state, floors)]


# --------------------------------------------------------------------------------------- durable


def _durable(settings: Settings, state: TrainingState, floors: Floors) -> list[Bar]:
    path = settings.directory / "floor.bin"
    floor = Contender(
        name=_FLOOR,
        run=lambda _: floors.write(path, 2),
        before=lambda: remove(path),
        after=lambda: remove(path),
    )
    saves = [_save_contender(method, settings.directory) for method in methods(state) if not method.load_only]
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


def _save_contender(method: Method, directory: Path) -> Contender:
    path = directory / "saved"

    def timed(clock: Clock) -> None:
        method.save(path)
        clock.mark("returned")
        if not method.durable:
            fsync_all(path)

    return Contender(name=method.name, run=timed, before=lambda: remove(path), after=lambda: remove(path))


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


# --------------------------------------------------------------------------------------- blocked


def _blocked(settings: Settings, state: TrainingState, floors: Floors) -> list[Bar]:
    with _stager() as stager:
        contenders = [
            _dcp_async(settings.directory, state, "dcp async_save", None),
            _dcp_async(settings.directory, state, "dcp async_save, its async stager", stager),
            _keepstep_background(settings.directory, state, _FRESH, reuse=False),
            _keepstep_background(settings.directory, state, _REUSED, reuse=True),
            Contender(name=_MEMCPY, run=lambda _: floors.copy(1)),
            Contender(name="floor: memcpy, 2 threads", run=lambda _: floors.copy(2)),
        ]
        rounds = interleaved(
            contenders,
            settings.size.rounds // 2 + 1,
            what="background save",
            settle=lambda: warm(state.bytes),
        )
    rows = []
    for contender in contenders:
        name = contender.name
        moments = [m for m in ("returned", "staged", "done") if (name, m) in rounds.times]
        cells = {moment: f"{rounds.median_s(name, moment):.3f}" for moment in moments}
        staged = "staged" if "staged" in moments else "done"
        rows.append(
            (
                name,
                cells.get("returned", cells["done"]),
                cells[staged],
                cells["done"] if "staged" in moments else "",
                f"{rounds.ratio(name, _MEMCPY, staged):.2f}",
            )
        )
    columns = ("background save", "returns s", "state may change s", "committed s", "copied: x memcpy")
    show_table(f"Time the loop is blocked, {state.bytes / 1e9:.2f} GB", columns, rows)
    ahead = rounds.ratio("dcp async_save", _REUSED, "staged", "staged")
    return [at_least("blocked by a background save: times shorter than dcp async_save", ahead, 1, "x")]


@contextmanager
def _stager() -> Iterator[DefaultStager]:
    """DCP's asynchronous stager as far as it goes without a GPU; it keeps its memory from save to save."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)
    try:
        yield stager
    finally:
        stager.close()


def _dcp_async(directory: Path, state: TrainingState, name: str, stager: DefaultStager | None) -> Contender:
    path = directory / "saved"

    def timed(clock: Clock) -> None:
        response = async_save(
            dcp_state_dict(state),
            storage_writer=FileSystemWriter(path, thread_count=2),
            async_stager=stager,
            no_dist=True,
        )
        clock.mark("returned")
        if isinstance(response, AsyncSaveResponse):
            response.staging_completion.result()
            clock.mark("staged")
            response.upload_completion.result()
        else:
            clock.mark("staged")
            response.result()

    return Contender(name=name, run=timed, before=lambda: remove(path), after=lambda: remove(path))


def _keepstep_background(directory: Path, state: TrainingState, name: str, *, reuse: bool) -> Contender:
    path = directory / ("reused" if reuse else "fresh")
    kept: list[Store] = []

    def before() -> None:
        remove(path)
        if not (reuse and kept):
            kept[:] = [Store(path)]
        if reuse and not path.exists():
            kept[0].save_in_background(state.objects).wait()
            remove(path)

    def timed(clock: Clock) -> None:
        pending = kept[0].save_in_background(state.objects, step=1)
        clock.mark("returned")
        clock.mark("staged")
        pending.wait()

    def after() -> None:
        remove(path)
        if not reuse:
            kept.clear()

    return Contender(name=name, run=timed, before=before, after=after)
