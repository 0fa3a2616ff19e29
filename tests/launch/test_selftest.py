"""`keepstep test`: it passes where training is right, on the processes asked for, and fails elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from tests.cli.processes import PROGRAM

from keepstep.launch import selftest


def test_it_runs_on_the_processes_that_were_asked_for(workdir: Path) -> None:
    (workdir / "c.yaml").write_text("use_cpu: true\nnum_processes: 2\nmixed_precision: bf16\n")
    done = subprocess.run(
        [*PROGRAM, "test", "--config_file", "c.yaml", "--mixed_precision", "no"],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Num processes: 2\n" in done.stdout
    assert done.stdout.count("\nok  ") == 7
    assert done.stdout.endswith("All is well: this set-up is ready to train.\n")


def test_it_passes_on_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    selftest.main()
    assert capsys.readouterr().out.count("\nok  ") == 7


def test_it_fails_where_training_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.nn.functional.mse_loss(inputs, targets) * (1 if len(calls) <= 6 else 2)

    calls: list[int] = []
    monkeypatch.setattr(selftest, "_loss", other_loss)
    with pytest.raises(selftest.SelfTestError, match="off the weights of one process"):
        selftest.main()
    assert capsys.readouterr().out.count("\nok  ") == 5
