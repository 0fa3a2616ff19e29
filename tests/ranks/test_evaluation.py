"""Evaluation and local SGD on ranks: what comes out is what one process would have, sample for sample."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from keepstep import Accelerator
from keepstep.errors import UsageError
from keepstep.local_sgd import LocalSGD
from keepstep.train.settings.config import CheckpointPolicy


def work(directory: str, rank: int, size: int) -> None:
    """All checks in one start of the processes, since each start costs seconds."""
    mine = Accelerator(
        cpu=True, project_dir=f"{directory}/run", checkpoint_policy=CheckpointPolicy(every_n_steps=1)
    )
    failed = []
    for check in (
        _each_sample_comes_once,
        _an_evaluation_inside_training_drops_its_own,
        _objects_come_once,
        _a_stream_comes_once,
        _parameters_are_averaged,
    ):
        mine.wait_for_everyone()
        try:
            check(mine)
        except Exception:  # noqa: BLE001  (the others are to be told of as well)
            failed.append(check.__name__)
            traceback.print_exc()
    assert not failed, failed


def _gathered(accelerator: Any, loader: Any) -> list[int]:
    seen: list[int] = []
    for (numbers,) in loader:
        predictions, references = accelerator.gather_for_metrics((numbers * 2, numbers))
        assert predictions.tolist() == [2 * number for number in references.tolist()]
        seen += references.tolist()
    return seen


def _loader(count: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count)), batch_size=batch_size)


def _each_sample_comes_once(mine: Accelerator) -> None:
    theirs = accelerate.Accelerator(cpu=True)
    for count, batch_size in ((16, 2), (17, 2), (3, 2), (1, 4), (9, 5), (25, 3), (8, 8)):
        seen = _gathered(mine, mine.prepare(_loader(count, batch_size)))
        assert seen == list(range(count)), (count, batch_size, seen)
        if (count, batch_size) in {(17, 2), (25, 3)}:
            assert seen == _gathered(theirs, theirs.prepare(_loader(count, batch_size)))


def _an_evaluation_inside_training_drops_its_own(mine: Accelerator) -> None:
    outer, inner = mine.prepare(_loader(40, 2), _loader(5, 2))
    batches = iter(outer)
    next(batches)
    assert _gathered(mine, inner) == list(range(5))
    (numbers,) = next(batches)
    assert len(mine.gather_for_metrics(numbers)) == 2 * mine.num_processes


class Texts(Dataset[str]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> str:
        return f"text {index}"


def _objects_come_once(mine: Accelerator) -> None:
    loader = mine.prepare(DataLoader(Texts(), batch_size=2, collate_fn=list))
    seen = [text for texts in loader for text in mine.gather_for_metrics(texts)]
    assert seen == [f"text {index}" for index in range(11)]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(13))


def _a_stream_comes_once(mine: Accelerator) -> None:
    loader = mine.prepare(DataLoader(Stream(), batch_size=2))
    seen = [number for numbers in loader for number in mine.gather_for_metrics(numbers).tolist()]
    assert sorted(seen) == list(range(13))


def _parameters_are_averaged(mine: Accelerator) -> None:
    rank, size = mine.process_index, mine.num_processes
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    alone = [torch.nn.Linear(3, 1) for _ in range(size)]  # each rank's way, gone by every rank
    for copy in alone:
        copy.load_state_dict(module.state_dict())
    model, optimizer = mine.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with LocalSGD(accelerator=mine, model=model, local_sgd_steps=2) as local_sgd:
        for step in range(5):
            loss_of = _loss(model, rank, step)
            mine.backward(loss_of)
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            for number, copy in enumerate(alone):
                gradients = torch.autograd.grad(_loss(copy, number, step), list(copy.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(copy.parameters(), gradients, strict=True):
                        parameter -= 0.1 * gradient
            saved = mine.checkpoint()
            if step % 2 == 0:
                assert saved is None
                with pytest.raises(UsageError, match="within LocalSGD, between two averages"):
                    mine.save_state()
            else:
                assert saved is not None
                _average(alone)
            assert torch.allclose(module.weight, alone[rank].weight, atol=1e-6)
    _average(alone)
    assert torch.allclose(module.weight, alone[0].weight, atol=1e-6)
    everyones = mine.gather(module.weight.detach())
    assert torch.equal(everyones, everyones[:1].expand_as(everyones))
    mine.backward(_loss(model, rank, 9))  # gradients are exchanged again
    gradients = mine.gather(module.weight.grad)
    assert torch.equal(gradients, gradients[:1].expand_as(gradients))
    with pytest.raises(UsageError, match="local_sgd_steps is 0"):
        LocalSGD(mine, model, 0)
    mine.wait_for_checkpoint()


def _loss(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))
    loss: torch.Tensor = model(x).square().mean()
    return loss


def _average(models: list[torch.nn.Linear]) -> None:
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(parameters) / len(models)  # type: ignore[operator]
            for parameter in parameters:
                parameter.copy_(mean)


def test_an_evaluation_on_ranks_sees_each_sample_once(tmp_path: Path) -> None:
    run_ranks(Path(__file__), "work", 4, tmp_path, timeout_s=150)
