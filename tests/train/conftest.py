"""Fixtures of the train tests."""

from __future__ import annotations

import pytest
from torch.utils.data import _utils


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a developer has set decides what a test does."""
    for name in (
        "WORLD_SIZE",
        "KEEPSTEP_USE_CPU",
        "KEEPSTEP_MIXED_PRECISION",
        "KEEPSTEP_GRADIENT_ACCUMULATION_STEPS",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _short_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a loader that a garbage collection found aren't waited for: they can't hear of its end."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
