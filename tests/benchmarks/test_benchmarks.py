"""Every part of the benchmarks runs, restores what it saves, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from pathlib import Path

import pytest
from benchmarks import __main__ as program
from benchmarks import blocked, cold, every_step, frozen, load, overhead, save, scale, small_tensors, tune
from benchmarks.every_step import samples_for
from benchmarks.methods import fsync_all
from benchmarks.report import Bar
from benchmarks.settings import TINY, Point, Settings
from benchmarks.simulated import SimulatedRanks
from benchmarks.small_tensors import fitted_exponent
from benchmarks.tuning.tree import MARK, Tree
from click.testing import CliRunner

from keepstep.checkpoint.format.parse import read_manifest, read_state


def bars_by_name(bars: list[Bar]) -> dict[str, Bar]:
    return {bar.name: bar for bar in bars}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(size=TINY, directory=tmp_path)


def test_save(settings: Settings) -> None:
    assert len(save.run(settings)) == 4


def test_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tuple(Point(step_s=step_s, steps=2, rounds=1, other_rounds=1) for step_s in (0.4, 1.0))
    size = dataclasses.replace(TINY, every_step=dataclasses.replace(TINY.every_step, points=points))
    monkeypatch.setattr(every_step, "samples_for", lambda *_: 9)  # two micro-batches
    bars = every_step.run(Settings(size=size, directory=tmp_path))
    assert [bar.target for bar in bars] == [">= 0.95", ">= 0.9"]
    assert all(0 < float(bar.measured) < 10 for bar in bars)
    printed = capsys.readouterr().out
    assert printed.count("keepstep, overlapped") == 2
    assert printed.count("accelerate save_state + fsync") == 2
    assert list(tmp_path.iterdir()) == []


def test_steps_of_a_wanted_length() -> None:
    def took_s(samples: int) -> float:
        return 0.02 + 0.05 * samples

    assert [samples_for(step_s, took_s, 1) for step_s in (0.01, 0.12, 0.52)] == [1, 2, 10]
    assert 57 <= samples_for(3.0, took_s, 8) <= 60


def test_blocked(settings: Settings) -> None:
    bars = blocked.run(settings)
    assert len(bars) == 3
    assert bars[0].met


def test_a_frozen_base_is_on_disk_once(settings: Settings) -> None:
    bars = frozen.run(settings)
    assert bars[0].met
    assert len(bars) == 2


def test_load(settings: Settings) -> None:
    bars = bars_by_name(load.run(settings))
    assert bars["peak memory: load_into"].met
    assert bars["peak memory: store.save"].met


def test_cold(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert [bar.target for bar in cold.run(settings)] == [">= 0.8x"]
    assert "stayed in the page cache" not in capsys.readouterr().out


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    assert cold.resident_share(tmp_path) == 1
    fsync_all(tmp_path)
    cold.drop_from_cache(tmp_path)
    assert cold.resident_share(tmp_path) == 0


def test_scale(settings: Settings) -> None:
    assert len(scale.run(settings)) == 6


def test_simulated_ranks_make_a_checkpoint_of_all_their_shards(tmp_path: Path) -> None:
    ranks = SimulatedRanks(size=3, tensors=2)
    ranks.commit(ranks.reports(ranks.plan()), tmp_path / "checkpoint_0")
    ranks.read_back(tmp_path / "checkpoint_0")
    manifest = read_manifest(tmp_path / "checkpoint_0")
    _, tensors = read_state(tmp_path / "checkpoint_0", manifest)[:2]
    assert [len(tensors[f"model/layers.{n}.weight"].chunks) for n in range(2)] == [3, 3]
    assert tensors["model/norm.weight"].shape == (64,)


def test_growth_per_ten_times_as_many() -> None:
    assert scale.growth_per_10x({1_000: 1.0, 4_000: 4.0}) == pytest.approx(10)
    assert scale.growth_per_10x({10: 1.0, 1_000: 10_000.0}) == pytest.approx(100)


def test_small_tensors(settings: Settings) -> None:
    assert len(small_tensors.run(settings)) == 2


def test_overhead(settings: Settings) -> None:
    assert len(overhead.run(settings)) == 7


def test_tune_without_ray(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = dataclasses.replace(settings, ray_python=Path("/bin/false"))
    bars = bars_by_name(tune.run(nowhere))
    assert len(bars) == 4
    assert all(float(bar.measured.split()[0].rstrip("x")) > 0 for bar in bars.values())
    printed = capsys.readouterr().out
    assert "pip install 'keepstep[bench]'" in printed
    assert printed.count("floor: bare processes") == 4
    assert list(settings.directory.iterdir()) == []


def test_processes_of_a_command_are_found_and_ended() -> None:
    tree = Tree("of this test", patience_s=0.2)
    command = ["/bin/sh", "-c", "setsid sleep 60 & sleep 60"]
    process = subprocess.Popen(command, env=os.environ | {MARK: "of this test"})
    try:
        while tree.peak.processes < 2:
            tree.sample()
        assert tree.peak.rss_bytes >= tree.peak.pss_bytes > 0
    finally:
        tree.ended()
    assert process.wait() == -signal.SIGKILL
    assert tree.processes() == []


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
