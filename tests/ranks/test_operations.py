"""What ranks do together, side by side with Accelerate's functions in the same group, and beyond them."""

from __future__ import annotations

import os
import random
import traceback
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import accelerate.utils as theirs
import numpy as np
import pytest
import torch
from tests.ranks.spawn import run_ranks

import keepstep.utils as ours
from keepstep import Accelerator
from keepstep.errors import (
    CollectiveMismatchError,
    NotTensorError,
    RankFailedError,
    UnsupportedTypeError,
    UsageError,
)
from keepstep.state import PartialState


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


def work(directory: str, rank: int, size: int) -> None:
    """All checks in one start of the processes, since each start costs seconds."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "WORK": directory}
    other, mine = accelerate.PartialState(cpu=True), Accelerator(cpu=True)
    assert (mine.num_processes, mine.process_index) == (other.num_processes, other.process_index)
    failed = []
    for check in (
        _gather_reduce_and_broadcast_are_theirs,
        _padding_is_theirs,
        _objects_are_theirs,
        _splitting_is_theirs,
        _refusals_reach_every_rank,
        _processes_run_what_is_theirs_to_run,
        _random_states_become_alike,
    ):
        mine.wait_for_everyone()
        try:
            check(mine, other)
        except Exception:  # noqa: BLE001  (the others are to be told of as well)
            failed.append(check.__name__)
            traceback.print_exc()
    assert not failed, failed


def _same(first: Any, second: Any) -> None:
    assert type(first) is type(second), (first, second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second), (first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            _same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            _same(one, two)
    else:
        assert first == second


def _rounded(tree: Any) -> Any:
    """Gloo adds up many ranks in another order."""
    return theirs.recursively_apply(
        lambda t: t.double().round(decimals=1 if t.element_size() == 2 else 5), tree
    )


def _trees(rank: int) -> list[Any]:
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(3, 2, generator=generator)
    return [
        rows,
        torch.tensor(rank),
        torch.arange(4).reshape(2, 2).T + rank,
        [rows, (rows.double(), rows.bfloat16())],
        {"out": Output(rows.sum(), rows), "labels": torch.arange(3) + rank},
        OrderedDict(z=rows, a=[rows.half(), torch.ones(0, 3)]),
        torch.randn(300, 200, generator=generator),
        [],
    ]


def _gather_reduce_and_broadcast_are_theirs(mine: Accelerator, other: accelerate.PartialState) -> None:
    for tree in _trees(other.process_index):
        _same(mine.gather(tree), theirs.gather(tree))
        _same(_rounded(mine.reduce(tree)), _rounded(theirs.reduce(tree, "sum")))
        _same(ours.reduce(tree, "max"), theirs.reduce(tree, "max"))
        for source in range(other.num_processes):
            given = [theirs.recursively_apply(torch.clone, tree) for _ in "ab"]
            _same(
                ours.broadcast(given[0], from_process=source),
                theirs.recursively_apply(
                    lambda t, source=source: theirs.broadcast(t.contiguous(), from_process=source), given[1]
                ),
            )
    floats = {"loss": torch.tensor(0.1 * (other.process_index + 1)), "many": torch.rand(70_000)}
    _same(_rounded(ours.reduce(floats)), _rounded(theirs.reduce(floats)))  # the mean is the default here
    by_key: Any = defaultdict(list, a=torch.ones(1))
    assert mine.gather(by_key)["a"].shape == (other.num_processes,)
    assert mine.gather(by_key).default_factory is list


def _padding_is_theirs(mine: Accelerator, other: accelerate.PartialState) -> None:
    rank = other.process_index
    tree = {"long": torch.ones(rank + 1, 3), "wide": [torch.ones(2, 5 - rank, dtype=torch.int64)]}
    for options in ({}, {"dim": 1}, {"dim": -1, "pad_index": -100}, {"pad_first": True}, {"dim": 7}):
        _same(mine.pad_across_processes(tree, **options), theirs.pad_across_processes(tree, **options))
    padded = mine.pad_across_processes(tree["long"])
    assert mine.gather(padded).shape == (other.num_processes**2, 3)
    flags = mine.pad_across_processes(torch.ones(rank + 1, dtype=torch.bool))
    assert flags.dtype == torch.bool  # Accelerate makes integers of them
    with pytest.raises(CollectiveMismatchError, match="different numbers of tensors, or of dimensions"):
        mine.pad_across_processes(torch.ones(2, 2) if rank else torch.ones(2))


def _objects_are_theirs(mine: Accelerator, other: accelerate.PartialState) -> None:
    rank, size = other.process_index, other.num_processes
    objects = [f"text {rank}", {"n": (rank, None, 2.5), "t": torch.full((2,), rank)}, *([b"more"] * rank)]
    _same(ours.gather_object(objects), theirs.gather_object(objects))
    long = [f"sample {n} of rank {rank}" for n in range(5000)]
    _same(ours.gather_object(long), theirs.gather_object(long))
    gathered = ours.gather_object([np.float32(rank), np.arange(3), {1, 2}])
    assert [str(item) for item in gathered[::3]] == [str(float(r)) for r in range(size)]
    for source in range(size):
        lists = [[rank, "x", None] for _ in "ab"]
        returned = ours.broadcast_object_list(lists[0], from_process=source)
        assert returned is lists[0]
        _same(returned, theirs.broadcast_object_list(lists[1], from_process=source))
    _same(mine.gather_for_metrics(objects), theirs.gather_object(objects))
    sizes = [torch.ones(rank + 1)]
    assert [len(t) for t in mine.gather_for_metrics(sizes, use_gather_object=True)] == [*range(1, size + 1)]


class Custom:
    pass


def _refusals_reach_every_rank(mine: Accelerator, other: accelerate.PartialState) -> None:
    last = other.is_last_process
    with pytest.raises(UnsupportedTypeError if last else RankFailedError, match="Custom"):
        ours.gather_object([{"a": Custom() if last else 1}])
    with pytest.raises(UsageError, match=r"expected a list.*Wrap a single object: \[object\]"):
        ours.gather_object({"a": 1})
    with pytest.raises(NotTensorError, match=r"reduce: \['a'\]\[1\] is of type str \('x'\)"):
        mine.reduce({"a": [torch.ones(1), "x"]})
    with pytest.raises(UsageError, match=r"scale is 0\.5; it is for XLA devices"):
        mine.reduce(torch.ones(1), scale=0.5)
    with pytest.raises(UsageError, match="from_process is 8"):
        ours.broadcast_object_list([1], from_process=8)
    with pytest.raises(CollectiveMismatchError):
        ours.broadcast_object_list([1], from_process=int(last))


def _splitting_is_theirs(mine: Accelerator, other: accelerate.PartialState) -> None:
    for count in (1, 3, 4, 9):
        numbers = list(range(count))
        for inputs, padding in (
            (numbers, False),
            (numbers, True),
            (tuple(numbers), False),
            (torch.tensor(numbers), False),
            (torch.tensor(numbers), True),
        ):
            with (
                mine.split_between_processes(inputs, apply_padding=padding) as ours_,
                other.split_between_processes(inputs, apply_padding=padding) as theirs_,
            ):
                _same(ours_, theirs_)
    with mine.split_between_processes([], apply_padding=True) as part:
        assert part == []
    given = {"prompts": ["a", "b", "c"], "ids": torch.arange(3)}
    with PartialState().split_between_processes(given, apply_padding=True) as part:
        assert len(part["prompts"]) == -(-3 // other.num_processes)
        assert len(given["prompts"]) == 3  # Accelerate cuts what it was given
        with other.split_between_processes(dict(given), apply_padding=True) as theirs_:
            _same(part, theirs_)
    with mine.split_between_processes((1, 2, 3), apply_padding=True) as part:  # Accelerate raises
        assert part[-1] in {1, 2, 3}
    with mine.split_between_processes(np.arange(8)) as part:
        assert len(part) == 8 // other.num_processes
    dataset = torch.utils.data.TensorDataset(torch.arange(8))
    with mine.split_between_processes(dataset) as part:
        assert int(part[0][0]) == other.process_index * 8 // other.num_processes
    with (
        pytest.raises(UsageError, match="can't split 'text' of type str"),
        mine.split_between_processes("text"),
    ):
        pass
    with pytest.raises(UsageError, match=r"must have one length; here: {'a': 1, 'b': 2}"):  # noqa: SIM117
        with mine.split_between_processes({"a": [1], "b": [1, 2]}):
            pass


def _processes_run_what_is_theirs_to_run(mine: Accelerator, other: accelerate.PartialState) -> None:
    rank, last = other.process_index, other.num_processes - 1

    def named() -> int:
        return rank

    assert mine.on_main_process(named).__name__ == "named"
    for decorate, there in (
        (mine.on_main_process, 0),
        (PartialState().on_local_main_process, 0),
        (mine.on_last_process, last),
        (mine.on_process(process_index=1), 1),
        (PartialState().on_local_process(local_process_index=last), last),
    ):
        assert decorate(named)() == (rank if rank == there else None)
    with pytest.raises(UsageError, match="process_index is not given"):
        mine.on_process(named)  # type: ignore[call-overload]
    order, local = Path(os.environ["WORK"], "main was here"), Path(os.environ["WORK"], "local was here")
    with mine.main_process_first():
        assert order.exists() is not mine.is_main_process
        order.touch()
    with PartialState().local_main_process_first():
        assert local.exists() is not mine.is_local_main_process
        local.touch()
    with pytest.raises(RankFailedError if other.process_index else OSError, match="disk full") as caught:  # noqa: SIM117
        with mine.main_process_first():
            raise OSError("disk full")
    assert "OSError: disk full" in repr(caught.value) or caught.type is OSError
    assert not mine.check_trigger()
    if mine.is_last_process:
        mine.set_trigger()
    assert mine.check_trigger()
    assert not mine.check_trigger()


def _random_states_become_alike(mine: Accelerator, other: accelerate.PartialState) -> None:
    for specific in (False, True):
        ours.set_seed(5, device_specific=specific)
        drawn = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(1))])  # noqa: NPY002
        alike = torch.equal(mine.reduce(drawn, "max"), drawn) and torch.equal(
            -mine.reduce(-drawn, "max"), drawn
        )
        assert mine.gather(torch.tensor(alike)).all() or specific
        theirs.set_seed(5 + specific * other.process_index)
        assert drawn.tolist() == pytest.approx([random.random(), np.random.rand(), float(torch.rand(1))])  # noqa: NPY002
    torch.manual_seed(other.process_index)
    generator = torch.Generator().manual_seed(100 + other.process_index)
    ours.synchronize_rng_states(["torch", "generator"], generator)
    assert len(set(mine.gather(torch.rand(1)).tolist())) == 1
    assert len(set(mine.gather(torch.rand(1, generator=generator)).tolist())) == 1
    with pytest.raises(UsageError, match="rng_type is 'cuda'; allowed"):
        ours.synchronize_rng_state("cuda")
    with pytest.raises(UsageError, match="no generator is given"):
        ours.synchronize_rng_state("generator")


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_work_together_as_with_accelerate(size: int, tmp_path: Path) -> None:
    run_ranks(Path(__file__), "work", size, tmp_path)
