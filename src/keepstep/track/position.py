"""How far a run's log has come: what its checkpoints remember of it, and what is rewound to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LogState", "Position"]


@dataclass(frozen=True, kw_only=True)
class Position:
    """A point in a run's log; what was logged after it by an attempt that died counts no more.

    Attributes:
        rows: how many rows had been logged.
        last_step: the largest step among them; None if there was none.
        kept: how many rows, the newest ones, were logged since the checkpoint was loaded and count all the
            same.
    """

    rows: int
    last_step: int | None
    kept: int = 0

    @property
    def next_step(self) -> int:
        """The first step that has not been logged."""
        return 0 if self.last_step is None else self.last_step + 1


@dataclass(eq=False, kw_only=True)
class LogState:
    """What every checkpoint holds of the log: the same in a run that was killed and in one that was not.

    Attributes:
        rows: how many rows have been logged.
        last_step: the largest step so far; None before the first row.
    """

    rows: int = 0
    last_step: int | None = None

    def count(self, step: int) -> None:
        """Note a row."""
        self.rows += 1
        self.last_step = step if self.last_step is None else max(self.last_step, step)

    @property
    def next_step(self) -> int:
        """The step of a row that is logged without one."""
        return 0 if self.last_step is None else self.last_step + 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rows": self.rows, "last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a saved position."""
        self.rows, self.last_step = state["rows"], state["last_step"]
