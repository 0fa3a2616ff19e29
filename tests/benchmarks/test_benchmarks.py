"""Every part of the benchmarks runs, restores what it saves, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from benchmarks import __main__ as program
from benchmarks import load, overhead, save, small_tensors
from benchmarks.report import Bar
from benchmarks.settings import TINY, Settings
from benchmarks.small_tensors import fitted_exponent
from click.testing import CliRunner


def bars_by_name(bars: list[Bar]) -> dict[str, Bar]:
    return {bar.name: bar for bar in bars}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(size=TINY, directory=tmp_path)


def test_save(settings: Settings) -> None:
    assert len(save.run(settings)) == 5


def test_load(settings: Settings) -> None:
    bars = bars_by_name(load.run(settings))
    assert bars["peak memory: load_into"].met
    assert bars["peak memory: store.save"].met


def test_small_tensors(settings: Settings) -> None:
    assert len(small_tensors.run(settings)) == 2


def test_overhead(settings: Settings) -> None:
    assert len(overhead.run(settings)) == 4


def test_the_exponent_of_a_straight_line_is_one() -> None:
    assert fitted_exponent({10: 1.0, 100: 10.0, 1000: 100.0}) == pytest.approx(1)
    assert fitted_exponent({10: 1.0, 100: 100.0}) == pytest.approx(2)


def test_the_program_measures_one_part_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "QUICK", TINY)
    result = CliRunner().invoke(
        program.main, ["--quick", "--only", "small_tensors", "--directory", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "FULL", dataclasses.replace(TINY, disk_bytes=1 << 62))
    result = CliRunner().invoke(program.main, ["--directory", str(tmp_path)])
    assert result.exit_code == 1
    assert "--directory" in result.output
