"""The Accelerator does the arithmetic of plain PyTorch and of Hugging Face Accelerate, bit for bit.

All of them run the same operations on the same batches; two ranks add two numbers, in whatever order.
So nothing needs a tolerance, but for a batch that a rank evaluates in another size than plain PyTorch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.parity import training
from tests.parity.training import CASES, Trace, by_hand, ours, theirs
from tests.ranks.spawn import run_ranks


def same_training(mine: Trace, other: Trace) -> None:
    assert mine.losses == other.losses
    assert mine.rates == other.rates
    assert mine.norms == other.norms
    assert torch.equal(mine.weights, other.weights)


@pytest.fixture
def _no_state_of_accelerate_stays() -> Iterator[None]:
    yield
    training.forget_their_states()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_no_state_of_accelerate_stays")
def test_on_one_process(name: str) -> None:
    case = CASES[name]
    mine, plain, other = ours(case), by_hand(case, 0, 1), theirs(case)
    same_training(mine, plain)
    same_training(mine, other)
    assert torch.equal(mine.evaluated, plain.evaluated)
    assert torch.equal(mine.evaluated, other.evaluated)
    assert len(set(mine.losses)) > len(mine.losses) // 2  # it does train


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks did with each; Accelerate's in processes of their own."""
    directory = tmp_path_factory.mktemp("traces")
    run_ranks(training.__file__, "ranks_with_keepstep_and_by_hand", 2, directory)
    run_ranks(training.__file__, "ranks_with_accelerate", 2, directory)
    return directory


def read(directory: Path, who: str, name: str) -> list[Trace]:
    """Of both ranks."""
    number = list(CASES).index(name)
    return [training.read_trace(directory / f"{who}_{number}_{rank}") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("who", ["by_hand", "theirs"])
def test_on_two_ranks(name: str, who: str, traces: Path) -> None:
    mine, other = read(traces, "ours", name), read(traces, who, name)
    for rank in range(2):
        same_training(mine[rank], other[rank])
        assert mine[rank].evaluated.shape == (CASES[name].samples, 3)
        torch.testing.assert_close(mine[rank].evaluated, other[rank].evaluated)
    assert torch.equal(mine[0].weights, mine[1].weights)
    assert mine[0].losses != mine[1].losses  # they have batches of their own
