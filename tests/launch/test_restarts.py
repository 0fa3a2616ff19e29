"""Whether failed ranks are started again, and what is said."""

from __future__ import annotations

import pytest

from keepstep.launch.restarts import RankEnd, Restarts, Verdict, exit_code_of, judge

KILLED = RankEnd(rank=1, pid=40, returncode=-9)
ERROR = RankEnd(rank=0, pid=39, returncode=1)


def judged(
    end: RankEnd, *, lived_s: float = 5, restarted: int = 0, restarts: Restarts | None = None
) -> Verdict:
    return judge(
        [end],
        killed=end.returncode < 0,
        lived_s=lived_s,
        restarted=restarted,
        restarts=restarts or Restarts(),
    )


@pytest.mark.parametrize(
    ("end", "lived_s", "restarted", "restarts", "again"),
    [
        (KILLED, 1, 0, Restarts(), True),
        (KILLED, 1, 2, Restarts(), True),
        (KILLED, 1, 3, Restarts(), False),
        (KILLED, 1, 0, Restarts(limit=0, after_any_failure=True), False),
        (ERROR, 59, 0, Restarts(), False),
        (ERROR, 61, 0, Restarts(), True),
        (ERROR, 61, 3, Restarts(), False),
        (ERROR, 1, 0, Restarts(limit=1, after_any_failure=True), True),
        (ERROR, 1, 1, Restarts(limit=1, after_any_failure=True), False),
    ],
)
def test_the_rule(end: RankEnd, lived_s: float, restarted: int, restarts: Restarts, again: bool) -> None:
    assert judged(end, lived_s=lived_s, restarted=restarted, restarts=restarts).restart is again


def test_what_is_said() -> None:
    words = judged(KILLED, restarted=1).words
    assert "rank 1 (process 40) was killed by SIGKILL" in words
    assert "Restart 2 of at most 3" in words
    assert (
        "rank 0 (process 39) ended with exit code 1, 5 s after the start. Not restarted"
        in judged(ERROR).words
    )
    assert "max_restarts is 0" in judged(KILLED, restarts=Restarts(limit=0)).words
    assert "that was restart 3 of 3" in judged(KILLED, restarted=3).words


def test_exit_codes_as_a_shell_reports_them() -> None:
    assert [exit_code_of(code) for code in (0, 3, -9, -15)] == [0, 3, 137, 143]
