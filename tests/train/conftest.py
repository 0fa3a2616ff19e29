"""Fixtures of the train tests."""

from __future__ import annotations

import pytest


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
