"""Functions that are started from where they stand; one script does what cells of a notebook would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.forked import run_program

from keepstep.errors import UsageError
from keepstep.launch import cuda
from keepstep.launch.notebook import debug_launcher, notebook_launcher

CELLS = """
import os, signal, sys
import torch
from keepstep import Accelerator, debug_launcher, notebook_launcher

in_the_notebook = []

def train(first, what):
    accelerator = Accelerator()
    in_the_notebook.append(1)
    total = accelerator.reduce(torch.ones(1) * (accelerator.process_index + first))
    if what == "fail" and accelerator.process_index == 1:
        raise ValueError("a bug of rank 1")
    if what == "die" and accelerator.process_index == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    accelerator.wait_for_everyone()
    name = f"{what}_{accelerator.process_index}"
    said = (accelerator.num_processes, total.item(), accelerator.mixed_precision, torch.get_num_threads())
    open(name, "w").write(" ".join(map(str, said)))

def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

before = handlers()
variables = dict(os.environ)
notebook_launcher(train, (1, "nb"), num_processes=2, mixed_precision="bf16")
notebook_launcher(train, (2, "die"), num_processes=2, max_restarts=1)
try:
    debug_launcher(train, args=(1, "fail"))
except Exception as error:
    print(type(error).__name__, error)
assert before == handlers()
assert variables == dict(os.environ)
notebook_launcher(train, (3, "one"), mixed_precision="bf16")
assert in_the_notebook == [1], "only the last one ran in this process"
try:
    notebook_launcher(train, (4, "two"), num_processes=2)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_cells_of_a_notebook(workdir: Path) -> None:
    (workdir / "cells.py").write_text(CELLS)
    done = run_program(workdir / "cells.py")
    assert done.returncode == 0, done.stdout
    assert [(workdir / f"nb_{rank}").read_text() for rank in (0, 1)] == ["2 3.0 bf16 1"] * 2
    assert [(workdir / f"die_{rank}").read_text() for rank in (0, 1)] == ["2 5.0 no 1"] * 2
    assert (workdir / "one_0").read_text() == "1 3.0 bf16 1"
    assert not (workdir / "two_0").exists()
    lines = done.stdout.splitlines()
    assert lines[0] == "Launching training on 2 CPUs."
    assert "Launching training on one CPU." in lines
    assert "RankFailedError Rank 1 failed, and all were stopped." in lines
    assert "ValueError: a bug of rank 1" in lines
    assert 'raise ValueError("a bug of rank 1")' in done.stdout
    assert lines[-1].startswith("UsageError An Accelerator was made in this process")
    assert any("was killed by SIGKILL" in line and "Restart 1 of at most 1" in line for line in lines)


def nothing() -> None:
    raise AssertionError("started")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_processes": "two"}, "num_processes is 'two'"),
        ({"num_processes": 2, "mixed_precision": "fp61"}, "mixed_precision is 'fp61'"),
        ({"num_processes": 2, "node_rank": 1}, "machine_rank is 1"),
        ({"num_processes": 2, "use_port": "no"}, "main_process_port is 'no'"),
        ({"num_processes": 2, "max_restarts": -1}, "max_restarts is -1"),
    ],
)
def test_mistakes_start_nothing(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        notebook_launcher(nothing, **arguments)  # type: ignore[arg-type]


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a function"):
        debug_launcher("train")  # type: ignore[arg-type]


def test_cuda_that_was_used_is_refused_with_the_line_that_did_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no GPU here, so torch's own calls at its initialization are made by hand."""
    monkeypatch.setattr(torch.cuda, "_queued_calls", [])
    monkeypatch.setattr(cuda, "_initialized_at", [])
    cuda.watch_cuda()
    cuda.refuse_used_cuda()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="KEEPSTEP_DEBUG_MODE=yes"):
        cuda.refuse_used_cuda()
    for call, _ in torch.cuda._queued_calls:
        call()  # the line that is told
    with pytest.raises(UsageError, match=r"test_notebook.py.*\n.*call\(\)  # the line that is told"):
        cuda.refuse_used_cuda()
