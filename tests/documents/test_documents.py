"""Blocks of tutorials on Accelerate run with their import line changed, on one process and on two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tests.cli.processes import PROGRAM
from tests.documents import checkpoints, notebook, quick_tour
from tests.forked import run_program
from tests.ranks.spawn import run_ranks
from tests.test_docs import ROOT, program_of

TUTORIALS: tuple[ModuleType, ...] = (quick_tour, checkpoints)
BLOCKS: dict[str, Callable[[], None]] = {
    name: block
    for tutorial in TUTORIALS
    for name, block in vars(tutorial).items()
    if callable(block) and getattr(block, "__module__", None) == tutorial.__name__
}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTEP_USE_CPU", "1")


@pytest.mark.parametrize("name", BLOCKS)
def test_on_one_process(name: str, workdir: Path) -> None:
    BLOCKS[name]()


def all_blocks(directory: str, rank: int, size: int) -> None:
    """What each rank runs: all blocks one after the other, since a start of the processes costs seconds."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    outcomes = {}
    for name, block in BLOCKS.items():
        place = Path(directory, name)
        place.mkdir(exist_ok=True)
        os.chdir(place)
        try:
            block()
            outcomes[name] = ""
        except Exception:  # noqa: BLE001 (told by the test of this block)
            outcomes[name] = traceback.format_exc()
        Path(directory, f"outcomes_{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], list[str]]:
    """What became of each block on each of two ranks, and what the ranks printed."""
    directory = tmp_path_factory.mktemp("two_ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEEPSTEP_USE_CPU", "1")
        said = run_ranks(__file__, "all_blocks", 2, directory)
    outcomes = [json.loads((directory / f"outcomes_{rank}.json").read_text()) for rank in range(2)]
    return outcomes, said


@pytest.mark.parametrize("name", BLOCKS)
def test_on_two_ranks(name: str, two_ranks: tuple[list[dict[str, str]], list[str]]) -> None:
    for of_rank in two_ranks[0]:
        assert not of_rank[name], of_rank[name]


def test_the_accelerator_prints_once_and_ranks_meet(
    two_ranks: tuple[list[dict[str, str]], list[str]],
) -> None:
    said = two_ranks[1]
    assert [output.count("said once") for output in said] == [1, 0]
    assert [output.count("Everyone is here") for output in said] == [1, 1]


def test_cells_of_a_notebook(tmp_path: Path) -> None:
    environment = {**os.environ, "KEEPSTEP_USE_CPU": "1", "KEEPSTEP_HOME": str(tmp_path)}
    done = run_program(Path(str(notebook.__file__)), environment=environment)
    assert done.returncode == 0, done.stdout
    # Three trainings: by its arguments, given a model, and on two machines, each of which prints.
    assert done.stdout.count("one of 2") == 1
    assert [done.stdout.count(f"epoch {epoch}: ") for epoch in range(5)] == [4] * 5


def test_the_guides_script_under_launch(tmp_path: Path) -> None:
    """With a file of options, in a place of its own, and arguments for the script."""
    script, config = tmp_path / "path_to_script.py", tmp_path / "path_to_config.yaml"
    script.write_text(program_of(ROOT / "docs" / "from-accelerate.md") + "import sys\nprint(sys.argv[1:])\n")
    config.write_text("num_processes: 2\nuse_cpu: true\n")
    command = ["launch", "--config_file", str(config), str(script), "--args_for_the_script"]
    done = subprocess.run(
        [*PROGRAM, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Not by lines: the other rank may print before a line has ended.
    told = re.findall(r"epoch (\d): (\d+) of 60 on 2 processes", done.stdout)
    assert [epoch for epoch, _ in told] == ["0", "1", "2"], done.stdout
    assert int(told[-1][1]) > 50
    assert done.stdout.count("['--args_for_the_script']") == 2
