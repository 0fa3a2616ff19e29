"""Fixtures of the train tests."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_generators() -> Iterator[None]:
    """Each test starts from, and leaves behind, the same global generators."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield


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
