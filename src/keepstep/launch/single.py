"""One process: a child that is started again when it is killed. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from keepstep.errors import UsageError
from keepstep.launch.leash import leashed
from keepstep.launch.plan import LaunchPlan
from keepstep.launch.restarts import RankEnd, exit_code_of, judge

__all__ = ["ENDING", "PASSED_ON", "outlives_its_terminal", "run_single"]

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a launch: ranks get them, and are not started again."""
PASSED_ON: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ranks get and that end nothing here, as schedulers send before they take a machine away."""


def outlives_its_terminal() -> bool:
    """Whether this process was started to ignore SIGHUP, as by nohup: then that ends nothing."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def run_single(plan: LaunchPlan, say: Callable[[str], None]) -> int:
    """Run the one process of a plan, again when it is to be restarted.

    Args:
        plan: what to run; the environment has been set.
        say: tells the user what happens.

    Returns:
        its exit code, 128 and the signal's number if it was killed.

    Raises:
        UsageError: the program cannot be started.
    """
    restarted = 0
    while True:
        began_s = time.monotonic()
        child = _start(plan.command)
        with _passing_signals_to(child) as ended_by:
            returncode = child.wait()
        if returncode == 0 or ended_by:
            return exit_code_of(returncode)
        verdict = judge(
            [RankEnd(rank=0, pid=child.pid, returncode=returncode)],
            killed=returncode < 0,
            lived_s=time.monotonic() - began_s,
            restarted=restarted,
            restarts=plan.manner.restarts,
        )
        say(verdict.words)
        if not verdict.restart:
            return exit_code_of(returncode)
        restarted += 1


def _start(command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(leashed(command), start_new_session=True)
    except OSError as error:
        raise UsageError(
            f"{command[0]} cannot be started: {error.strerror}. Is it the program you meant?"
        ) from None


@contextlib.contextmanager
def _passing_signals_to(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """The child gets the signals that come here; what it started gets those that end the launch, but later.

    It gets them once the child has ended: a child that saves first, or goes on, would find the workers killed
    that load its data.

    Yields:
        the signals that end the launch, as they come.
    """
    ended_by: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if ended_by and number in ENDING:  # whoever says it twice means it
                os.killpg(child.pid, signal.SIGKILL)
            else:
                os.kill(child.pid, number)
        if number in ENDING:
            ended_by.append(number)

    taken = {*ENDING, *PASSED_ON} - ({signal.SIGHUP} if outlives_its_terminal() else set())
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield ended_by
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for ending in ended_by[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, ending)
