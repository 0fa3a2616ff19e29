"""The example script, killed by a real signal and started again with the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from examples.train_gpt import CONTEXT, GPT, sample, shakespeare

from keepstep import Store

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"
STEPS = 24
KILL_AFTER_STEP = 14  # in the second epoch
TIMEOUT_S = 100


def start(out: Path, save_every: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--epochs", "2", "--batches", "12"]
    command += ["--save-every", str(save_every)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return printed


def losses_in(out: Path) -> list[dict[str, float]]:
    log = out / "losses.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def kill_after(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(losses_in(out)) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_and_started_again_it_ends_as_if_it_had_never_been_killed(tmp_path: Path) -> None:
    twin, run = tmp_path / "twin", tmp_path / "run"
    undisturbed = start(twin, save_every=STEPS)
    kill_after(start(run, save_every=1), run, KILL_AFTER_STEP)
    logged = len(losses_in(run))
    resumed, expected = finish(start(run, save_every=1)), finish(undisturbed)

    assert resumed.startswith("weights: ")
    assert resumed == expected  # the digest of the weights, and the text that was drawn from the model
    curve = {line["step"]: line["loss"] for line in losses_in(twin)}
    assert list(curve) == list(range(1, STEPS + 1))
    assert all(line["loss"] == curve[line["step"]] for line in losses_in(run))
    went_on_at = losses_in(run)[logged]["step"]
    assert logged - 2 <= went_on_at <= logged + 1
    assert {line["pid"] for line in losses_in(run)[:logged]}.isdisjoint(
        line["pid"] for line in losses_in(run)[logged:]
    )
    assert [saved.step for saved in Store(run / "checkpoints").list()] == [STEPS - 2, STEPS - 1, STEPS]
    assert [saved.step for saved in Store(twin / "checkpoints").list()] == [STEPS]


def test_the_text_is_all_plays_without_markdown() -> None:
    inputs, targets = shakespeare().tensors
    assert len(inputs) * CONTEXT > 4_800_000
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = bytes(inputs.flatten().tolist()).decode("ascii")
    assert "To be, or not" in text.replace("\n", " ")
    assert not set("*#_\\\t\r") & set(text)


def test_a_sample_starts_as_asked_and_has_the_length_asked_for() -> None:
    torch.manual_seed(0)
    text = sample(GPT(), "HAMLET\n", 80)
    assert text.startswith("HAMLET\n")
    assert len(text) == 87


def test_the_script_is_short_and_its_keepstep_lines_are_few() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) < 120
    assert 8 <= sum("# keepstep" in line for line in lines) <= 12
    assert os.access(SCRIPT, os.R_OK)
