"""`keepstep test`: does this set-up train right? Really runs the processes that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from keepstep.cli.launch import launch_options, settings_for
from keepstep.launch.machine import ThisMachine
from keepstep.launch.plan import Script, plan_launch
from keepstep.launch.runner import run_plan

__all__ = ["command"]


@click.command(
    name="test",
    short_help="Try a short training on the processes of a launch.",
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    epilog="\b\nExit codes:\n"
    "  0  all is well\n"
    "  1  a check failed; its traceback says what was expected\n"
    "  2  wrong usage; nothing was started",
)
@launch_options
def command(config_file: Path | None, **options: Any) -> None:
    """Try a short training on the processes of a launch.

    Takes the options of keepstep launch and its configuration file, starts the processes, and checks on
    each that ranks find and wait for each other, draw the same random numbers, gather, share the data, train
    to the weights of one process, and go on from a checkpoint in the same bytes.
    """
    settings, manner = settings_for(config_file, options)
    script = Script(target="keepstep.launch.selftest", kind="module")
    code = run_plan(plan_launch(settings, script, manner, ThisMachine()))
    click.get_current_context().exit(code)
