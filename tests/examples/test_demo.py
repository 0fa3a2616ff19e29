"""The demo: whole with few steps, sabotaged, and its parts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from examples.demo.__main__ import MARK, claim
from examples.demo.compare import change_one_weight, differences, same_losses
from examples.demo.kills import Kill, plan, resumed
from examples.demo.race import race
from examples.demo.screen import Lines, TerminalBars, bars_for
from examples.demo.training import Deadline, DemoError, Loss, Training
from rich.console import Console

from keepstep import save_directory

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 630  # more than the demo's own, which says what it waited for


def demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.demo", "--out", str(out), "--epochs", "2", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def losses(pid: int, values: Sequence[float], first: int = 1) -> list[Loss]:
    return [Loss(step=step, loss=value, pid=pid, clock_s=0.0) for step, value in enumerate(values, first)]


def run_to_its_end(training: Training, deadline: Deadline) -> None:
    with training.running():
        while not training.is_over():
            deadline.pause(training.name)


@pytest.mark.timeout(TIMEOUT_S + 10)
def test_it_ends_well_and_shows_everything(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = demo(out, "--batches", "25", "--seed", "7", "--timed-steps", "14", "--rounds", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    printed = result.stdout
    assert "--seed 7" in printed
    assert printed.count("SIGKILL") == 3
    assert re.search(r"while checkpoint_\d+\.tmp-\w+ was being written", printed)
    killed, twin = re.findall(r"│ ([0-9a-f]{64}) │", printed)
    assert killed == twin
    for text in ("HAMLET", "keepstep ls", "steps done again", "no checkpoints", "a checkpoint at every step"):
        assert text in printed
    assert re.search(r"All 5\d losses of all attempts are exactly the twin's", printed)
    assert "bit for bit the same weights" in " ".join(printed.split())
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "losses.png").stat().st_size > 10_000


@pytest.mark.timeout(TIMEOUT_S + 10)
def test_sabotaged_it_fails_and_names_the_part(tmp_path: Path) -> None:
    result = demo(tmp_path / "demo", "--batches", "12", "--kills", "1", "--sabotage")
    assert result.returncode == 1, result.stdout + result.stderr
    killed, twin = re.findall(r"│ ([0-9a-f]{64}) │", result.stdout)
    assert killed != twin
    assert "The runs differ" in result.stdout
    assert re.search(r"model/characters\.weight differs in 1 of \d+ values", result.stdout)
    assert "the same weights" not in result.stdout


def test_a_directory_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    with pytest.raises(DemoError, match="was not made by the demo"):
        claim(tmp_path)
    with pytest.raises(DemoError, match="was not made by the demo"):
        claim(precious)
    assert precious.read_text() == "mine"


def test_a_directory_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    claim(tmp_path / "out")
    (tmp_path / "out" / "old").write_text("old")
    claim(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]


@pytest.mark.parametrize("seed", range(50))
def test_a_plan_follows_from_its_seed_and_kills_once_while_saving(seed: int) -> None:
    planned = plan(seed, steps=40, kills=3)
    assert planned == plan(seed, steps=40, kills=3)
    assert sum(kill.while_saving for kill in planned) == 1
    steps = [kill.after_step for kill in planned]
    assert steps == sorted(set(steps))
    assert steps[0] >= 2
    assert steps[-1] < 32


def test_a_plan_needs_room() -> None:
    with pytest.raises(DemoError, match="3 kills in 5 steps"):
        plan(0, steps=5, kills=3)
    with pytest.raises(DemoError, match="0 kills"):
        plan(0, steps=50, kills=0)


def test_equal_losses_are_counted_over_all_attempts() -> None:
    curve = [3.0, 2.5, 2.0]
    assert same_losses(losses(1, curve[:2]) + losses(2, curve[1:], first=2), losses(3, curve)) == 4


def test_a_loss_that_differs_in_the_last_bit_is_named() -> None:
    with pytest.raises(DemoError, match="At step 2 process 1 had a loss of"):
        same_losses(losses(1, [3.0, 2.0000000000000004]), losses(2, [3.0, 2.0]))


def test_a_step_without_a_loss_is_named() -> None:
    with pytest.raises(DemoError, match=r"steps \[2\]"):
        same_losses(losses(1, [3.0]), losses(2, [3.0, 2.0]))


def test_what_was_lost_is_read_off_the_next_attempt() -> None:
    killed = losses(1, [3.0, 2.5, 2.0]) + losses(2, [2.5, 2.0, 1.5], first=2)
    (kill,) = resumed([Kill(at_step=3, committed_step=1, unfinished=None)], killed)
    assert kill.resumed_from == 1
    assert kill.lost_steps == 2


def test_going_on_from_an_older_checkpoint_than_the_newest_is_a_failure() -> None:
    killed = losses(1, [3.0, 2.5, 2.0]) + losses(2, [2.5, 2.0, 1.5], first=2)
    with pytest.raises(
        DemoError, match="newest checkpoint was of step 2, but the next attempt went on from step 1"
    ):
        resumed([Kill(at_step=3, committed_step=2, unfinished=None)], killed)
    with pytest.raises(DemoError, match="3 attempts, not 2"):
        resumed([Kill(at_step=3, committed_step=1, unfinished=None)] * 2, killed)


def test_every_part_that_differs_is_named(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(3)}, "train": {"lr": 0.1, "loss": float("nan"), "list": [1, 2]}}
    mine = save_directory(tmp_path / "mine", state)
    state["model"] = {"w": torch.tensor([0.0, -0.0, 1.0]), "b": torch.ones(1)}
    state["train"] = {"lr": 0.2, "loss": float("nan"), "list": [1, 2, 3]}
    its = save_directory(tmp_path / "its", state)
    assert differences(mine, mine) == []
    assert differences(mine, its) == [
        "model/w differs in 2 of 3 values, by up to 1",
        "model/b is only in the twin",
        "train/lr is 0.1, the twin's 0.2",
        "train/list has 2 items, the twin's 3",
    ]


def test_the_sabotage_is_a_sound_checkpoint(tmp_path: Path) -> None:
    saved = save_directory(tmp_path / "one", {"model": {"w": torch.zeros(3)}}, step=5, metrics={"loss": 1.0})
    changed = change_one_weight(saved)
    assert changed.verify().sound
    assert (changed.step, changed.metrics) == (5, {"loss": 1.0})
    assert int((changed.load()["model"]["w"] != 0).sum()) == 1


def test_without_a_terminal_a_line_tells_every_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with bars_for(Console(), {"run": 8}) as bars:
        assert isinstance(bars, Lines)
        for done in range(9):
            bars.show("run", done)
            bars.show("run", done)
    assert capsys.readouterr().out.splitlines() == [f"run: {done} of 8 steps" for done in (2, 4, 6, 8)]


def test_on_a_terminal_there_are_bars() -> None:
    with (
        Console(force_terminal=True).capture() as _,
        bars_for(Console(force_terminal=True), {"run": 8}) as bars,
    ):
        assert isinstance(bars, TerminalBars)
        bars.show("run", 8)
        bars.say("a line")


def test_a_run_that_fails_is_shown_with_its_last_words(tmp_path: Path) -> None:
    failing = Training("the run", tmp_path / "run", epochs=1, batches=1, save_every=1)
    failing.command = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    with pytest.raises(DemoError, match=r"(?s)the run ended with exit code 1.*out of luck"):
        run_to_its_end(failing, Deadline(60))


def test_a_run_that_hangs_is_given_up_and_killed(tmp_path: Path) -> None:
    hanging = Training("the run", tmp_path / "run", epochs=1, batches=1, save_every=1)
    hanging.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    began_s = time.monotonic()
    with pytest.raises(DemoError, match="the run is not over after"):
        run_to_its_end(hanging, Deadline(0.5))
    assert time.monotonic() - began_s < 30
    with pytest.raises(ProcessLookupError):
        hanging.signal(0)


def test_a_run_that_is_always_over_too_soon_is_given_up(tmp_path: Path) -> None:
    quick = [
        Training(name, tmp_path / name, epochs=1, batches=50, save_every=1)
        for name in ("the run", "the twin")
    ]
    for run in quick:
        run.command = [sys.executable, "-c", ""]
    lines = Lines(Console(quiet=True), {"the run": 50, "the twin": 50})
    with pytest.raises(DemoError, match="the run finished before"):
        race(quick[0], quick[1], plan(0, steps=50, kills=1), lines, Deadline(60))
