"""`keepstep env`: what a report of a problem needs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from keepstep import __version__
from keepstep.cli.phrasing import printable
from keepstep.errors import UsageError
from keepstep.launch.environment import default_config_file, variables
from keepstep.launch.machine import ThisMachine

__all__ = ["command"]

_PACKAGES = ("torch", "numpy", "safetensors", "pyyaml", "transformers", "accelerate")


@click.command(
    name="env",
    short_help="Say what runs here: versions, devices, configuration.",
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    epilog="\b\nExit codes:\n  0  done\n  2  wrong usage, or not readable",
)
@click.option("--config_file", type=click.Path(path_type=Path), help="Default: the one that launches read.")
def command(config_file: Path | None) -> None:
    """Say what runs here: versions, devices, configuration. Nothing is changed.

    Copy it into a report of a problem.
    """
    if config_file is not None and not config_file.exists():
        raise UsageError(f"There is no configuration file {config_file}.")
    for name, value in _facts():
        click.echo(f"- {name}: {value}")
    path = config_file or default_config_file()
    if not path.exists():
        click.echo(f"- Configuration: none ({path} is not there)")
        return
    click.echo(f"- Configuration: {path}")
    for line in path.read_text(encoding="utf-8", errors="backslashreplace").splitlines():
        click.echo(f"    {printable(line)}")


def _facts() -> Iterator[tuple[str, str]]:
    yield "keepstep", __version__
    yield "Platform", platform.platform()
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    for package in _PACKAGES:
        yield package, _version(package)
    yield "Processors", str(ThisMachine().cpus)
    yield "GPUs", _gpus()
    told = {
        name: value for name, value in variables().items() if name.startswith(("KEEPSTEP_", "ACCELERATE_"))
    }
    yield "Variables", " ".join(f"{name}={value}" for name, value in sorted(told.items())) or "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not ThisMachine().gpus:
        return "none"
    torch: Any = import_module("torch")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
