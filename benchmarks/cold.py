"""How long a restore takes when nothing of the checkpoint is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.floors import Floors
from benchmarks.machine import warm
from benchmarks.measure import Contender, Rounds, interleaved
from benchmarks.methods import fsync_all, methods, remove
from benchmarks.report import Bar, at_least, note, show_table, status
from benchmarks.settings import Settings
from benchmarks.workload import TrainingState

__all__ = ["drop_from_cache", "resident_share", "run"]

_DIRECT = "floor: O_DIRECT, 2 threads"
_BUFFERED = "floor: buffered, 2 threads"
_RAW_SHARE = 0.8
_COLD_SHARE = 0.01
"""So much may still be in the page cache: pages that another process maps can't be dropped."""


def run(settings: Settings) -> list[Bar]:
    """Print the table; return the bars."""
    state = TrainingState(settings.size)
    everyone = [method for method in methods(state) if not method.load_only and method.name != "dcp"]
    places = {method.name: settings.directory / method.name.replace(" ", "-") for method in everyone}
    floors = Floors(state.tensors())
    expected = state.digest()
    found: dict[str, float] = {}
    try:
        for method in everyone:
            with status(f"cold: saving for {method.name}"):
                method.save(places[method.name])
        contenders = [
            Contender(
                name=method.name,
                run=lambda _, method=method: method.load(places[method.name]),  # type: ignore[misc]
                before=_spoiled_and_cold(state, places[method.name], found, method.name),
                after=_restored(state, expected, method.name),
            )
            for method in everyone
        ]
        contenders += _floors(floors, places["keepstep"], found)
        rounds = interleaved(
            contenders, settings.size.rounds, what="cold load", settle=lambda: warm(state.bytes)
        )
    finally:
        for place in places.values():
            remove(place)
    _show(rounds, [contender.name for contender in contenders], state.bytes, found)
    raw = min(rounds.ratio(name, "keepstep") for name in (_DIRECT, _BUFFERED))
    return [at_least("cold load: of the raw read rate, the faster way", raw, _RAW_SHARE, "x")]


def _floors(floors: Floors, place: Path, found: dict[str, float]) -> list[Contender]:
    """Raw reads of the files that keepstep loads."""

    def read(*, direct: bool) -> None:
        floors.read_files(_files(place), 2, direct=direct)

    def cold(name: str) -> Callable[[], None]:
        return lambda: _go_cold(place, found, name)

    return [
        Contender(name=_DIRECT, run=lambda _: read(direct=True), before=cold(_DIRECT)),
        Contender(name=_BUFFERED, run=lambda _: read(direct=False), before=cold(_BUFFERED)),
    ]


def _spoiled_and_cold(
    state: TrainingState, place: Path, found: dict[str, float], name: str
) -> Callable[[], None]:
    def before() -> None:
        state.spoil()
        _go_cold(place, found, name)

    return before


def _restored(state: TrainingState, expected: str, name: str) -> Callable[[], None]:
    def after() -> None:
        digest = state.digest()
        state.reseat()
        if digest != expected:
            raise AssertionError(f"{name} did not restore the state: digest {digest}, expected {expected}")

    return after


def _show(rounds: Rounds, names: Sequence[str], size_bytes: int, found: dict[str, float]) -> None:
    rows = [
        (
            name,
            f"{rounds.median_s(name):.3f}",
            rounds.spread(name),
            f"{size_bytes / rounds.median_s(name) / 1e9:.2f}",
            f"{rounds.ratio(name, 'keepstep'):.2f}",
            f"{found[name]:.1%}",
        )
        for name in names
    ]
    columns = ("cold load into live objects", "s", "spread s", "GB/s", "x keepstep", "was cached")
    show_table(f"Load {size_bytes / 1e9:.2f} GB that the page cache does not hold", columns, rows)
    note("'was cached': of its files, just before it began; the worst of all rounds.")


# ------------------------------------------------------------------------------------- page cache


def _go_cold(place: Path, found: dict[str, float], name: str) -> None:
    fsync_all(place)
    drop_from_cache(place)
    share = resident_share(place)
    found[name] = max(share, found.get(name, 0.0))
    if share > _COLD_SHARE:
        note(f"{share:.1%} of {place.name} stayed in the page cache: this is no cold load")


def drop_from_cache(place: Path) -> None:
    """Take what is on disk already out of the page cache: call it after an fsync."""
    for path in _files(place):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident_share(place: Path) -> float:
    """How much of the files is in the page cache, between 0 and 1, as mincore(2) says."""
    pages = resident = 0
    for path in _files(place):
        if size := path.stat().st_size:
            here = _resident_pages(path, size)
            pages += len(here)
            resident += int((here & 1).sum())
    return resident / max(1, pages)


def _resident_pages(path: Path, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    vector = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)
        status_code = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(vector.ctypes.data)
        )
        del view
    if status_code != 0:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return vector


def _files(place: Path) -> list[Path]:
    """The files that a load reads, largest first; a store's lock and the like are left out."""
    inside = place / "checkpoint_0"
    files = [path for path in (inside if inside.exists() else place).rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)
