"""Ranks have failed: are they started again? Decided purely; the words are for whoever watches the run."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["DEFAULT_LIMIT", "EARLY_S", "RankEnd", "Restarts", "Verdict", "exit_code_of", "judge"]

DEFAULT_LIMIT: Final = 3
EARLY_S: Final = 60.0
"""An error this early is taken for a bug or a wrong argument, which another start would only repeat."""


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """How often failed ranks are started again.

    Attributes:
        limit: at most so many times.
        after_any_failure: also after an error in the first minute; otherwise only ranks that were killed, or
            that ended with an error later than that, are started again.
    """

    limit: int = DEFAULT_LIMIT
    after_any_failure: bool = False


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How a rank ended.

    Attributes:
        rank: its number in the whole run.
        pid: of its process.
        returncode: its exit code; negative for the signal that killed it.
    """

    rank: int
    pid: int
    returncode: int

    @property
    def words(self) -> str:
        """What happened, as a sentence without its end."""
        who = f"rank {self.rank} (process {self.pid})"
        if self.returncode >= 0:
            return f"{who} ended with exit code {self.returncode}"
        return f"{who} was killed by {signal_name(-self.returncode)}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is done now.

    Attributes:
        restart: start all ranks again.
        words: what failed, what is done, and why.
    """

    restart: bool
    words: str


def judge(
    ends: Sequence[RankEnd], *, killed: bool, lived_s: float, restarted: int, restarts: Restarts
) -> Verdict:
    """Decide whether ranks are started again.

    Args:
        ends: ranks that failed by themselves, the first one first.
        killed: whether one of them was killed, or may have been killed by what happened on another machine.
        lived_s: how long the ranks ran, seconds.
        restarted: how many restarts there were.
        restarts: the rule.
    """
    what = f"{'; '.join(end.words for end in ends) or 'a rank failed'}, {lived_s:.0f} s after the start"
    if restarts.limit == 0:
        return Verdict(restart=False, words=f"{what}. Not restarted: max_restarts is 0.")
    if restarted >= restarts.limit:
        return Verdict(
            restart=False, words=f"{what}. Not restarted: that was restart {restarted} of {restarts.limit}."
        )
    if not (killed or restarts.after_any_failure or lived_s >= EARLY_S):
        return Verdict(
            restart=False,
            words=f"{what}. Not restarted: an error in the first {EARLY_S:.0f} s would only come again (to "
            f"restart all the same: --max_restarts {restarts.limit}). The rank's own output tells the error.",
        )
    return Verdict(
        restart=True,
        words=f"{what}. Restart {restarted + 1} of at most {restarts.limit}: all ranks start again, and "
        "Accelerator.resume() goes on from the newest checkpoint.",
    )


def exit_code_of(returncode: int) -> int:
    """What a shell reports for a process: 128 and the signal's number for one that was killed."""
    return 128 - returncode if returncode < 0 else returncode


def signal_name(number: int) -> str:
    """A signal's name, and for the one that out-of-memory killers use, a hint."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (if nobody sent it: by the kernel, out of memory)" if name == "SIGKILL" else name
