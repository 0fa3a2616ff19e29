"""Whatever is trained, on however many ranks: a run that is gone on with ends as one never left off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.ranks import matrix
from tests.ranks.spawn import run_ranks


def a_choice_of_cells() -> list[matrix.Cell]:
    """Each pair of values is in one of them."""
    cells = matrix.all_cells()
    wanted = {pair for cell in cells for pair in pairs_of(cell)}
    chosen: list[matrix.Cell] = []
    while wanted:
        best = max(cells, key=lambda cell: len(wanted & pairs_of(cell)))
        chosen.append(best)
        wanted -= pairs_of(best)
    return chosen


def pairs_of(cell: matrix.Cell) -> set[tuple[str, str]]:
    values = sorted(f"{name}={value}" for name, value in cell.items() if name != "leave_after")
    return {(a, b) for a in values for b in values if a < b}


def check(cells: list[matrix.Cell], size: int, folder: Path, timeout_s: float) -> None:
    for what in ("whole", "left", "resumed"):
        argument = json.dumps([what, cells, str(folder)])
        run_ranks(matrix.__file__, "run", size, argument, timeout_s=timeout_s)
    for rank in range(size):
        whole, left, resumed = (
            json.loads((folder / f"{what}-{rank}.json").read_text()) for what in ("whole", "left", "resumed")
        )
        for cell, undisturbed, before, after in zip(cells, whole, left, resumed, strict=True):
            about = f"rank {rank} of {size}, {cell}"
            assert after["end"] == undisturbed["end"], about
            assert after["step"] == undisturbed["step"], about
            again = len(before["seen"]) + len(after["seen"]) - len(undisturbed["seen"])
            assert again >= 0, about
            if after["resumed at"] is not None and cell["precision"] != "fp16":  # which skips its first steps
                assert again < cell["accumulation"], about
            assert undisturbed["seen"][len(undisturbed["seen"]) - len(after["seen"]) :] == after["seen"], (
                about
            )
        assert any(after["resumed at"] for after in resumed), "nothing was resumed"


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_was_left_off_ends_as_a_whole_one(size: int, tmp_path: Path) -> None:
    check(a_choice_of_cells(), size, tmp_path, 150)


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_run_that_was_left_off_ends_as_a_whole_one(size: int, tmp_path: Path) -> None:
    check(matrix.all_cells(), size, tmp_path, 1500)
