"""What the demo prints at its end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.demo.kills import Kill
from examples.demo.race import StepTimes
from examples.demo.training import DemoError
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

__all__ = ["print_digests", "print_kills", "print_ls", "print_sample", "print_times"]

LS_TIMEOUT_S = 30


def print_digests(console: Console, killed: str, twin: str) -> None:
    """Print the digests of both runs' weights."""
    table = Table(title="SHA-256 of the weights in the last checkpoint", title_justify="left")
    table.add_column("run")
    table.add_column("digest", style="bold green" if killed == twin else "bold red", no_wrap=True)
    table.add_row("killed", killed)
    table.add_row("twin, never killed", twin)
    console.print(table)


def print_kills(console: Console, kills: Sequence[Kill]) -> None:
    """Print what each kill cost."""
    table = Table(title="What was lost: at most the steps since the last commit", title_justify="left")
    for heading in ("killed after", "newest checkpoint", "went on after", "steps done again"):
        table.add_column(heading, justify="right")
    table.add_column("found unfinished", overflow="fold")
    for kill in kills:
        steps = [f"step {step}" for step in (kill.at_step, kill.committed_step, kill.resumed_from)]
        table.add_row(*steps, f"{kill.lost_steps}", kill.unfinished or "-")
    console.print(table)


def print_times(console: Console, without: StepTimes, saving: StepTimes) -> None:
    """Print what a step costs without and with checkpoints."""
    table = Table(title="Time per step, measured in turns with nothing else running", title_justify="left")
    table.add_column("")
    for heading in ("steps", "median", "9 of 10 below", "ratio"):
        table.add_column(heading, justify="right")
    for name, times in (("no checkpoints", without), ("a checkpoint at every step", saving)):
        ratio = times.median_ms / without.median_ms
        figures = (f"{times.steps}", f"{times.median_ms:.1f} ms", f"{times.p90_ms:.1f} ms", f"{ratio:.2f}")
        table.add_row(name, *figures)
    console.print(table)


def print_ls(console: Console, directory: Path) -> None:
    """Print `keepstep ls` of a run.

    Raises:
        DemoError: the command failed.
    """
    command = [str(Path(sys.executable).with_name("keepstep")), "ls", str(directory)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LS_TIMEOUT_S,
        check=False,
        env=os.environ | {"COLUMNS": str(console.width)},
    )
    if result.returncode:
        raise DemoError(f"`{' '.join(command)}` ended with exit code {result.returncode}:\n{result.stderr}")
    console.print(f"$ keepstep ls {directory}", style="bold", highlight=False)
    console.print(Text(result.stdout.rstrip()), soft_wrap=True)


def print_sample(console: Console, text: str) -> None:
    """Print what the model wrote."""
    console.print(Panel(Text(text), title="Written by both models", title_align="left", expand=False))
