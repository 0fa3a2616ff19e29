"""Whatever is trained, on however many ranks: a run that is gone on with ends as one never left off."""

from __future__ import annotations

import json
import shutil
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


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_run_that_was_left_off_ends_as_a_whole_one(size: int, tmp_path: Path) -> None:
    check(a_choice_of_cells(), size, tmp_path, 150)


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_run_that_was_left_off_ends_as_a_whole_one(size: int, tmp_path: Path) -> None:
    check(matrix.all_cells(), size, tmp_path, 1500)


def test_another_number_of_ranks_goes_on_and_sees_each_sample_once(tmp_path: Path) -> None:
    """Left off on 2 ranks after 3 batches each, gone on with on 1, and on 3."""
    cells = [
        {"precision": "no", "workers": 0, "accumulation": 1, "source": source, "leave_after": 3}
        for source in ("map", "custom sampler", "iterable without", "dispatch")
    ]
    argument = json.dumps(["left", cells, str(tmp_path / "2")])
    (tmp_path / "2").mkdir()
    run_ranks(matrix.__file__, "run", 2, argument)
    for size in (1, 3):
        shutil.copytree(tmp_path / "2", tmp_path / str(size))
        run_ranks(matrix.__file__, "run", size, json.dumps(["resumed", cells, str(tmp_path / str(size))]))
        before = [json.loads((tmp_path / "2" / f"left-{rank}.json").read_text()) for rank in range(2)]
        after = [
            json.loads((tmp_path / str(size) / f"resumed-{rank}.json").read_text()) for rank in range(size)
        ]
        for number, cell in enumerate(cells):
            left = matrix.SAMPLES - sum(len(seen) for run in before for seen in run[number]["seen"])
            rest = rest_of_epoch([run[number]["seen"] for run in after], left)
            seen = [index for run in before for batch in run[number]["seen"] for index in batch] + rest
            assert sorted(seen) == list(range(matrix.SAMPLES)), f"{size} ranks, {cell}"


def rest_of_epoch(seen: list[list[list[int]]], samples: int) -> list[int]:
    """What the ranks saw together until so many samples; fillers of the last batches come after them."""
    together = [index for batches in zip(*seen, strict=True) for batch in batches for index in batch]
    return together[:samples]
