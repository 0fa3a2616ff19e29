"""`python -m benchmarks`: keepstep beside its peers and the floor, in one run.

Ratios within a round are what counts; absolute times depend on the machine and on who else uses it.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks import blocked, cold, every_step, frozen, load, overhead, save, scale, small_tensors, tune
from benchmarks.methods import quiet_peers
from benchmarks.report import Bar, heading, note, show_bars
from benchmarks.settings import FULL, QUICK, Settings

_PARTS: dict[str, Callable[[Settings], list[Bar]]] = {
    "every_step": every_step.run,
    "blocked": blocked.run,
    "frozen": frozen.run,
    "save": save.run,
    "load": load.run,
    "cold": cold.run,
    "small_tensors": small_tensors.run,
    "scale": scale.run,
    "overhead": overhead.run,
    "tune": tune.run,
}


@click.command()
@click.option(
    "--only", type=click.Choice(list(_PARTS)), multiple=True, help="Run this part only (repeatable)."
)
@click.option("--quick", is_flag=True, help="A smaller state and fewer rounds, a few minutes.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/bench"),
    show_default=True,
    help="On the disk to be measured; what is written there is removed.",
)
@click.option(
    "--ray-python",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="An interpreter that has Ray Tune, for the part `tune`; by default this one, if it has it.",
)
def main(only: tuple[str, ...], quick: bool, directory: Path, ray_python: Path | None) -> None:
    """Measure keepstep beside torch.save, Accelerate, DCP and Ray Tune."""
    quiet_peers()
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    size = QUICK if quick else FULL
    _check_space(directory, size.disk_bytes)
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(dir=directory, prefix="run-") as workplace:
        free = shutil.disk_usage(directory).free
        note(f"{torch.get_num_threads()} torch threads; torch {torch.__version__}")
        note(f"writing below {directory}: {free / 1e9:.0f} GB free, {size.disk_bytes / 1e9:.0f} GB needed")
        for name in only or _PARTS:
            heading(name)
            place = Path(workplace) / name
            place.mkdir()
            part_began = time.perf_counter()
            found = _PARTS[name](Settings(size=size, directory=place.resolve(), ray_python=ray_python))
            show_bars(f"Bars: {name}", found)
            note(f"{name} took {time.perf_counter() - part_began:.0f} s")
            bars += found
    heading(f"all bars, after {time.perf_counter() - began:.0f} s")
    show_bars("What was promised and what was measured", bars)


def _check_space(directory: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise click.ClickException(
            f"{directory} has {free / 1e9:.1f} GB free; {needed_bytes / 1e9:.0f} GB are needed. "
            "Free some, or name another disk with --directory"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written is removed
    main()
