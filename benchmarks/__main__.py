"""`python -m benchmarks`: keepstep beside its peers and the floor, in one run.

Ratios within a round are what counts; absolute times depend on the machine and on who else uses it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks import load, overhead, save, small_tensors
from benchmarks.methods import quiet_peers
from benchmarks.report import Bar, heading, note, show_bars
from benchmarks.settings import FULL, QUICK, Settings

_PARTS: dict[str, Callable[[Settings], list[Bar]]] = {
    "save": save.run,
    "load": load.run,
    "small_tensors": small_tensors.run,
    "overhead": overhead.run,
}
_NEEDED_BYTES = 12 << 30


@click.command()
@click.option(
    "--only", type=click.Choice(list(_PARTS)), multiple=True, help="Run this part only (repeatable)."
)
@click.option("--quick", is_flag=True, help="A smaller state and fewer rounds, under 1.5 minutes.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/bench"),
    show_default=True,
    help="On the disk to be measured; what is written there is removed.",
)
def main(only: tuple[str, ...], quick: bool, directory: Path) -> None:
    """Measure keepstep beside torch.save, Accelerate and DCP."""
    quiet_peers()
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    _check_space(directory)
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(dir=directory, prefix="run-") as workplace:
        note(f"{torch.get_num_threads()} torch threads; torch {torch.__version__}; writing below {directory}")
        for name in only or _PARTS:
            heading(name)
            place = Path(workplace) / name
            place.mkdir()
            found = _PARTS[name](Settings(size=QUICK if quick else FULL, directory=place.resolve()))
            show_bars(f"Bars: {name}", found)
            bars += found
    heading(f"all bars, after {time.perf_counter() - began:.0f} s")
    show_bars("What was promised and what was measured", bars)


def _check_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_BYTES:
        raise click.ClickException(
            f"{directory} has {free / 1e9:.1f} GB free; {_NEEDED_BYTES / 1e9:.0f} GB are needed. "
            "Free some, or name another disk with --directory"
        )


if __name__ == "__main__":
    main()
