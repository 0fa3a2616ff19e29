"""How long a save in the background blocks the loop, and how long the state must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from benchmarks.floors import Floors
from benchmarks.machine import warm
from benchmarks.measure import Clock, Contender, Rounds, interleaved
from benchmarks.methods import dcp_state_dict, remove
from benchmarks.report import Bar, at_least, at_most, note, show_table
from benchmarks.settings import Settings
from benchmarks.workload import TrainingState
from keepstep.checkpoint.in_flight import Staging
from keepstep.checkpoint.store import Store

__all__ = ["run"]

_AUTO = "keepstep, auto"
_AWAITED = "keepstep, awaited"
_DCP = "dcp async_save"
_MEMCPY = "floor: memcpy, 1 thread"
_BLOCKED_LIMIT_MS = 20


def run(settings: Settings) -> list[Bar]:
    """Print the table; return the bars."""
    state = TrainingState(settings.size)
    floors = Floors(state.tensors())
    kept = Store(settings.directory / "kept")
    with _stager() as stager:
        contenders = [
            _dcp_async(settings.directory, state, _DCP, None),
            _dcp_async(settings.directory, state, "dcp async_save, its async stager", stager),
            _keepstep(settings.directory, state, "keepstep, awaited, first save", "awaited", None),
            _keepstep(settings.directory, state, _AWAITED, "awaited", kept),
            _keepstep(settings.directory, state, _AUTO, "auto", kept),
            Contender(name=_MEMCPY, run=lambda _: floors.copy(1)),
            Contender(name="floor: memcpy, 2 threads", run=lambda _: floors.copy(2)),
        ]
        try:
            rounds = interleaved(
                contenders, settings.size.rounds, what="background save", settle=lambda: warm(state.bytes)
            )
        finally:
            remove(kept.path)
    _show(rounds, [contender.name for contender in contenders], state.bytes)
    return _bars(rounds)


def _show(rounds: Rounds, names: list[str], size_bytes: int) -> None:
    rows = []
    for name in names:
        moments = [m for m in ("returned", "staged", "done") if (name, m) in rounds.times]
        cells = {moment: f"{rounds.median_s(name, moment):.3f}" for moment in moments}
        staged = "staged" if "staged" in moments else "done"
        rows.append(
            (
                name,
                cells.get("returned", cells["done"]),
                cells[staged],
                rounds.spread(name, staged),
                cells["done"] if "staged" in moments else "",
                f"{rounds.ratio(name, _MEMCPY, staged):.2f}",
            )
        )
    columns = (
        "background save",
        "returns s",
        "state may change s",
        "spread s",
        "committed s",
        "copied: x memcpy",
    )
    show_table(f"Time the loop is blocked, {size_bytes / 1e9:.2f} GB", columns, rows)
    note("A loop whose forward and backward last until the state may change is blocked for 'returns' only.")


def _bars(rounds: Rounds) -> list[Bar]:
    limit = _BLOCKED_LIMIT_MS
    ahead = rounds.ratio(_DCP, _AWAITED, "staged", "staged")
    return [
        at_most(
            "automatic save: blocked, forward and backward longer than the copy",
            rounds.median_s(_AUTO, "returned") * 1e3,
            limit,
            " ms",
            digits=1,
        ),
        at_most("automatic save: until the state may change", rounds.ratio(_AUTO, _MEMCPY, "staged"), 1, "x"),
        at_least("awaited save: times shorter than dcp async_save", ahead, 1, "x"),
    ]


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


def _keepstep(
    directory: Path, state: TrainingState, name: str, staging: Staging, store: Store | None
) -> Contender:
    """With a store that has staged before, as in a long run, or with a new one each time if it is None."""
    path = directory / "fresh" if store is None else store.path
    chosen: list[Store] = []

    def before() -> None:
        chosen[:] = [store or Store(path)]
        if store is not None and not path.exists():
            store.save_in_background(state.objects).wait()
        _remove_checkpoints(path)
        state.advance()

    def timed(clock: Clock) -> None:
        pending = chosen[0].save_in_background(state.objects, step=1, staging=staging)
        clock.mark("returned")
        pending.wait_staged()
        clock.mark("staged")
        pending.wait()

    def after() -> None:
        _remove_checkpoints(path)
        if store is None:
            chosen.clear()
            remove(path)

    return Contender(name=name, run=timed, before=before, after=after)


def _remove_checkpoints(path: Path) -> None:
    for checkpoint in path.glob("checkpoint_*"):
        remove(checkpoint)
