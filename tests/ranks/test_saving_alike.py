"""What ranks that save have to do alike, on two ranks in one launch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch import nn

from keepstep import Accelerator, CheckpointPolicy
from keepstep.errors import RanksDifferError, UsageError
from keepstep.utils import InitProcessGroupKwargs


def prepared(place: Path, policy: CheckpointPolicy | None = None) -> tuple[Accelerator, Any, Any]:
    quick = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    accelerator = Accelerator(cpu=True, project_dir=place, checkpoint_policy=policy, kwargs_handlers=[quick])
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return (accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1)))


def train(accelerator: Accelerator, model: Any, optimizer: Any, after: Callable[[int], object]) -> None:
    for number in range(4):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(2, 3)).mean())
        optimizer.step()
        accelerator.checkpoint()
        after(number)
    accelerator.wait_for_checkpoint()


def places_of_its_own_are_refused(folder: Path, rank: int) -> None:
    accelerator, *_ = prepared(folder / "one")
    with pytest.raises(RanksDifferError, match=r"s0 on rank 0.*s1 on rank 1"):
        accelerator.save_state(folder / f"s{rank}")
    assert not (folder / f"s{rank}").exists()
    accelerator.save_state(folder / "both")
    with pytest.raises(RanksDifferError, match=r"project0.* on rank 0"):
        prepared(folder / f"project{rank}")[0].resume()
    with pytest.raises(RanksDifferError, match=r"project0.* on rank 0"):
        prepared(folder / f"project{rank}")[0].save_state()
    with pytest.raises(UsageError, match="safe_serialization=False"):
        accelerator.save_state(folder / "pickles", safe_serialization=False)


def policies_of_its_own_are_refused(folder: Path, rank: int) -> None:
    run = prepared(folder / "policies", CheckpointPolicy(every_n_steps=1 + rank))
    with pytest.raises(RanksDifferError, match=r"every_n_steps=1.*rank 0.*every_n_steps=2.*rank 1"):
        train(*run, after=lambda number: None)


def what_one_rank_alone_has_frozen_is_refused(folder: Path, rank: int) -> None:
    model = nn.Linear(3, 1).requires_grad_(rank == 0)
    with pytest.raises(RanksDifferError, match=r"rank 1 has weight.* frozen"):
        prepared(folder / "frozen")[0].prepare(model)


class Average:
    """Of the weights: a tensor that the loop writes to when it likes."""

    def __init__(self) -> None:
        self.value = torch.zeros(100_000)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


def what_changes_while_it_is_copied_is_saved_again(folder: Path, rank: int) -> None:
    for writers in ((0, 1), (1,)):
        place = folder / f"written by {len(writers)}"
        policy = CheckpointPolicy(every_n_steps=1, staging="overlapped")
        accelerator, model, optimizer = prepared(place, policy)
        average = Average()
        accelerator.register_for_checkpointing(average)
        writes = rank in writers
        train(accelerator, model, optimizer, lambda _, a=average, w=writes: w and a.value.add_(1))
        assert accelerator.checkpoint_counts.failed == 0
        assert accelerator.checkpoint_counts.redone <= 1
        accelerator, *_ = prepared(place, policy)
        accelerator.register_for_checkpointing(Average())
        found = accelerator.resume()
        assert found is not None
        assert found.step == 4


def what_has_uneven_steps_is_not_saved(folder: Path, rank: int) -> None:
    """Rank 1 has no last batch, and would not come to save it."""
    accelerator, model, optimizer = prepared(folder / "uneven", CheckpointPolicy(every_n_steps=1))

    def steps(count: int) -> None:
        for _ in range(count):
            accelerator.backward(model(torch.ones(2, 3)).mean())
            optimizer.step()
            optimizer.zero_grad()

    with accelerator.join_uneven_inputs([model], even_batches=False):
        steps(3 - rank)
        for save in (accelerator.checkpoint, lambda: accelerator.save_state(folder / "uneven by hand")):
            with pytest.raises(UsageError, match=r"join_uneven_inputs.*after the block"):
                save()
    accelerator.checkpoint()
    with accelerator.join_uneven_inputs([model], even_batches=True):
        steps(1)
        assert accelerator.checkpoint() is not None
    accelerator.wait_for_checkpoint()
    assert accelerator.checkpoint_counts.saved == 2


def run(argument: str, rank: int, size: int) -> None:
    for check in (
        places_of_its_own_are_refused,
        policies_of_its_own_are_refused,
        what_one_rank_alone_has_frozen_is_refused,
        what_changes_while_it_is_copied_is_saved_again,
        what_has_uneven_steps_is_not_saved,
    ):
        print(check.__name__, flush=True)
        check(Path(argument), rank)


def test_ranks_save_alike(tmp_path: Path) -> None:
    run_ranks(__file__, "run", 2, tmp_path, timeout_s=150)
