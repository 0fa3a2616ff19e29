"""Results as pandas data frames. The only module of tune that imports pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

__all__ = ["frame"]


def frame(rows: Sequence[Mapping[str, Any]], index: str | None = None) -> pd.DataFrame:
    """Rows by flat names as a data frame.

    Args:
        rows: {name: value}; what a row lacks is missing there.
        index: the column that names the rows; None: they are counted from 0.
    """
    made = pd.DataFrame.from_records(list(rows))
    return made.set_index(index) if index is not None and rows else made
