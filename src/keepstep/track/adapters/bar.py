"""tqdm's progress bar."""

from __future__ import annotations

from tqdm.auto import tqdm

__all__ = ["Bar"]

Bar = tqdm
