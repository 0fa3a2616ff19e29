"""Carries a plan out: a child, or torch's agent with its ranks."""

from __future__ import annotations

import sys
from importlib import import_module

from keepstep.launch.leash import leashed
from keepstep.launch.plan import LaunchPlan
from keepstep.launch.single import run_single
from keepstep.patching import patch_environment

__all__ = ["run_plan"]


def run_plan(plan: LaunchPlan, *, quiet: bool = False) -> int:
    """Start what a plan says and wait for it.

    Args:
        plan: what to start.
        quiet: say only what fails.

    Returns:
        the exit code: 0, or that of the process that failed first.

    Raises:
        UsageError: the program cannot be started.
    """
    if not quiet:
        for note in (*plan.notes, f"Starting {plan.summary}."):
            _say(note)
    with patch_environment(**plan.environment):
        if plan.rendezvous is None:
            return run_single(plan, _say)
        program, *arguments = leashed(plan.command)
        code: int = import_module("keepstep.launch.elastic").run_group(plan, program, arguments, _say)
        return code


def _say(text: str) -> None:
    sys.stderr.write(f"keepstep launch: {text}\n")
    sys.stderr.flush()
