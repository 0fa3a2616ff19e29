"""Loaders on several ranks: lengths, ends and remainders, what can be sent, and what is refused."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler

from keepstep import Accelerator, skip_first_batches
from keepstep.errors import (
    RankFailedError,
    RankMissingError,
    RanksDifferError,
    UnsupportedTypeError,
    UsageError,
)
from keepstep.utils import DataLoaderConfiguration
from keepstep.world import Ranks

Options = dict[str, Any]
WAYS: dict[str, tuple[bool, Options]] = {
    "map": (False, {}),
    "map split": (False, {"split_batches": True}),
    "map dispatched": (False, {"dispatch_batches": True}),
    "map uneven": (False, {"even_batches": False}),
    "stream": (True, {}),
    "stream split": (True, {"split_batches": True}),
    "stream everywhere": (True, {"dispatch_batches": False}),
    "stream uneven": (True, {"even_batches": False}),
}


class Range(IterableDataset[Any]):
    """The numbers from 0, without positions."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor(number) for number in range(self.length))


def plain(stream: bool, length: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    dataset: Any = Range(length) if stream else range(length)
    return DataLoader(dataset, batch_size, **options)


def prepared(loader: DataLoader[Any], **options: Any) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    return accelerator, accelerator.prepare(loader)


def check(_: str, rank: int, size: int) -> None:
    """Many checks in one start of the processes."""
    torch.manual_seed(rank)  # what a rank seeded for itself doesn't matter
    _passes(rank, size)
    _as_under_accelerate(rank, size)
    _skipping()
    _shuffled_alike(size)
    _inside_each_other(rank, size)
    _batches_of_every_kind(rank)
    _refused(rank, size)
    _differing(rank)
    _left_and_entered_again(size)
    _failing(rank)
    _odd_ones(rank, size)
    _parcels(rank, size)


def _passes(rank: int, size: int) -> None:
    """Every sample once, in order; the last step knows that it is the last, and how much of it is real."""
    for name, (stream, options) in WAYS.items():
        for length, drop_last in ((0, False), (1, False), (7, False), (16, False), (19, False), (19, True)):
            accelerator, loader = prepared(plain(stream, length, 4, drop_last=drop_last), **options)
            case = (name, length, drop_last)
            world, state = accelerator._world, accelerator.gradient_state
            gathered, ends, lengths = [], [], []
            mine = [(batch, state.end_of_dataloader, state.remainder) for batch in loader]
            steps = world.exchange(len(mine))
            assert len(loader) == len(mine), (case, rank)
            for batch, end, remainder in mine:
                ends.append(end)
                lengths.append(len(batch))
                if "uneven" not in name:
                    everyone = world.gather(batch).tolist()
                    gathered += everyone[:remainder] if end and remainder > 0 else everyone
            assert not any(ends[:-1]), case
            assert ends[-1:] in ([], [True]), case
            if "uneven" in name:
                gathered = sorted(
                    n for part in world.exchange([b.tolist() for b, _, _ in mine]) for b in part for n in b
                )
                assert max(steps) - min(steps) <= 1, case
            else:
                assert len(set(steps)) == 1, case
                assert len(set(map(tuple, world.exchange(lengths)))) == 1, case
            units = 4 if "split" in name else 4 * size
            expected = length // units * units if drop_last else length
            assert gathered == list(range(expected)), case
            assert not state.in_dataloader
            assert (state.active_dataloader, state.remainder) == (None, -1)


def _as_under_accelerate(rank: int, size: int) -> None:
    """The same batches, apart from the values that fill up the last one."""
    from accelerate import PartialState
    from accelerate.data_loader import prepare_data_loader

    assert PartialState(cpu=True).num_processes == size
    for stream, split, dispatch in ((True, False, True), (True, True, True), (False, False, True)):
        for length in (8, 16, 19, 22, 24, 30):
            theirs = prepare_data_loader(
                plain(stream, length, 4),
                put_on_device=True,
                split_batches=split,
                dispatch_batches=dispatch,
                device=torch.device("cpu"),
            )
            accelerator, ours = prepared(
                plain(stream, length, 4), split_batches=split, dispatch_batches=dispatch
            )
            case = (stream, split, dispatch, length)
            assert len(ours) == len(theirs), case
            assert ours.total_batch_size == (4 if split else 4 * size)
            left = [(batch, ours.remainder, ours.end_of_dataloader) for batch in ours]
            right = [(batch, theirs.remainder, theirs.end_of_dataloader) for batch in theirs]
            assert [batch.tolist() for batch, _, _ in left[:-1]] == [b.tolist() for b, _, _ in right[:-1]], (
                case
            )
            assert [end for _, _, end in left] == [end for _, _, end in right], case
            assert len(left[-1][0]) == len(right[-1][0]), case
            real = accelerator._world.gather(left[-1][0])[: right[-1][1]]
            assert real.tolist() == accelerator._world.gather(right[-1][0])[: right[-1][1]].tolist(), case


def _skipping() -> None:
    for name, (stream, options) in WAYS.items():
        _, loader = prepared(plain(stream, 30, 4), data_seed=1, **options)
        whole = [batch.tolist() for batch in loader]
        for skipped in (0, 1, len(whole) - 1, len(whole), len(whole) + 2):
            view = skip_first_batches(loader, skipped)
            assert len(view) == max(len(whole) - skipped, 0), name
            assert [batch.tolist() for batch in view] == whole[skipped:], (name, skipped)
        assert len([*loader]) == len(whole), name


def _shuffled_alike(size: int) -> None:
    accelerator, loader = prepared(DataLoader(range(32), 2, shuffle=True))
    for _ in range(2):
        seen = accelerator._world.exchange([n for batch in loader for n in batch.tolist()])
        assert sorted(n for numbers in seen for n in numbers) == list(range(32))
        assert len(seen) == size
    assert loader.set_epoch(0) is None


def _inside_each_other(rank: int, size: int) -> None:
    """An evaluation inside a training loop is the one that counts."""
    accelerator = Accelerator(cpu=True)
    training, evaluation = accelerator.prepare(
        DataLoader(range(8 * size), 4), DataLoader(range(6 * size + 1), 4)
    )
    state = accelerator.gradient_state
    for _ in training:
        assert state.active_dataloader is training
        last = training.end_of_dataloader
        found, texts = [], []
        for batch in evaluation:
            assert state.active_dataloader is evaluation
            found += accelerator.gather_for_metrics(batch).tolist()
            texts += accelerator.gather_for_metrics([f"text {number}" for number in batch.tolist()])
        assert found == list(range(6 * size + 1))
        assert texts == [f"text {number}" for number in found]
        assert state.active_dataloader is training
        assert (state.end_of_dataloader, state.remainder) == (last, 0)
    assert accelerator.prepare(training) is training


class Pair(NamedTuple):
    left: Any
    right: Any


class Encoding(UserDict[str, Any]):
    """A mapping of its own, as tokenizers give them."""


class Opaque:
    """Nothing can be known of it."""


def _batches_of_every_kind(rank: int) -> None:
    def collate(samples: list[torch.Tensor]) -> Any:
        numbers = torch.stack(samples)
        return Encoding(
            ids=numbers,
            half=numbers.to(torch.bfloat16),
            pair=Pair(numbers[:, None] * 2, [f"text {n}" for n in numbers.tolist()]),
            array=np.asarray(numbers.tolist()),
            scalar=torch.tensor(3.5),
            what=("constant", 5, None, True),
        )

    for options in ({}, {"split_batches": True}):
        accelerator, loader = prepared(plain(True, 18, 4, collate_fn=collate), **options)
        for batch in loader:
            numbers = batch["ids"].tolist()
            assert type(batch) is Encoding
            assert type(batch["pair"]) is Pair
            assert batch["half"].dtype == torch.bfloat16
            assert batch["half"].tolist() == numbers == batch["array"].tolist()
            assert batch["pair"].left.tolist() == [[2 * n] for n in numbers]
            assert batch["pair"].right == [f"text {n}" for n in numbers]
            assert batch["scalar"].item() == 3.5
            assert batch["what"] == ("constant", 5, None, True)
    # Batches that can't be put together: the last step repeats whole ones.
    ragged = plain(True, 10, 2, collate_fn=lambda samples: torch.zeros(2, 1 + int(samples[0])))
    accelerator, loader = prepared(ragged)
    assert len({len(accelerator._world.exchange(list(batch.shape))) for batch in loader}) == 1


def _refused(rank: int, size: int) -> None:
    for loader, options, message in (
        (plain(False, 8, size + 1), {"split_batches": True}, f"batch size is {size + 1} .* {size} ranks"),
        (plain(True, 8, size + 1), {"split_batches": True}, f"batch size is {size + 1} .* {size} ranks"),
        (DataLoader(range(8), None), {"split_batches": True}, "no batch_size"),
        (
            DataLoader(range(8), 2, sampler=DistributedSampler(range(8), size, rank)),
            {},
            f"num_replicas={size}",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            prepared(loader, **options)
    for error, collate in (
        (UsageError, lambda _: {"x": Local()}),
        (UnsupportedTypeError, lambda _: Opaque()),
    ):

        class Local(UserDict[str, Any]):
            pass

        _, loader = prepared(plain(True, 9, 2, collate_fn=collate))
        with pytest.raises(error if rank == 0 else RankFailedError, match=r"Local|Opaque"):
            list(loader)
    _, loader = prepared(plain(True, 9, 2 * size, collate_fn=lambda _: "no rows"), split_batches=True)
    with pytest.raises(UsageError if rank == 0 else RankFailedError, match="can't be cut"):
        list(loader)
    with pytest.raises(UsageError, match="-1"):
        skip_first_batches(loader, -1)
    with pytest.raises(TypeError):
        len(prepared(DataLoader(Endless(), 2))[1])


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1


class OfItsRank(Sampler[int]):
    """Begins somewhere else on each rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter([(number + self.rank) % 8 for number in range(8)])


class SplitByItself(IterableDataset[Any]):
    """Each rank reads its own part."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank * 10, self.rank * 10 + 10))


class Kept(IterableDataset[Any]):
    """Numbers up to a length; says where it is."""

    def __init__(self, length: int) -> None:
        self.length, self.at = length, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.length:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def _left_and_entered_again(size: int) -> None:
    """No step of a stream with a state is lost by a `break`."""
    for options in ({}, {"dispatch_batches": False}, {"split_batches": True}):
        length = 10 * size**2
        accelerator, loader = prepared(DataLoader(Kept(length), size), **options)
        seen = []
        for _ in range(2):
            for batch in loader:
                seen += accelerator._world.gather(batch).tolist()
                if loader.position == 3:
                    break
        loader.set_epoch(7)
        for batch in loader:
            seen += accelerator._world.gather(batch).tolist()
        assert sorted(seen) == list(range(length)), options


def _differing(rank: int) -> None:
    for loader, message in (
        (DataLoader(range(8), 2, sampler=OfItsRank(rank)), "order of the samples"),
        (DataLoader(range(8 + rank), 2), "order of the samples"),
        (DataLoader(range(8 + 4 * rank), 2), "number of batches"),
    ):
        _, unlike = prepared(loader)
        with pytest.raises(RanksDifferError, match=message) as caught:
            next(iter(unlike))
        assert "on rank 1" in str(caught.value)
    _, loader = prepared(DataLoader(SplitByItself(rank), 2), dispatch_batches=False)
    with pytest.raises(RanksDifferError, match="what the data set gives first"):
        next(iter(loader))
    _, loader = prepared(DataLoader(range(8), 2))
    loader.set_epoch(rank)
    with pytest.raises(RanksDifferError, match="number of the pass"):
        next(iter(loader))
    assert list(prepared(DataLoader(range(8), 2))[1])


class Broken(Range):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in super().__iter__():
            if number == 20:
                raise OSError("the disk is gone")
            yield number


def _failing(rank: int) -> None:
    """What happens on rank 0 while it reads is heard everywhere, and the next pass works."""
    _, loader = prepared(DataLoader(Broken(40), 2))
    with pytest.raises(OSError if rank == 0 else RankFailedError, match="the disk is gone"):
        list(loader)
    assert next(iter(loader)).tolist() == [2 * rank, 2 * rank + 1]


def _odd_ones(rank: int, size: int) -> None:
    accelerator, loader = prepared(DataLoader(range(2 * size + 1), None))
    assert len(loader) == 3
    seen = accelerator._world.exchange([int(sample) for sample in loader])
    assert [numbers[:2] for numbers in seen] == [[other, size + other] for other in range(size)]
    batches = [[2 * n, 2 * n + 1] for n in range(2 * size)]
    _, loader = prepared(DataLoader(range(4 * size), None, sampler=batches))
    assert len(loader) == 2
    weighted = DataLoader(range(9), 2, sampler=RandomSampler(range(9), replacement=True, num_samples=21))
    accelerator, loader = prepared(weighted)
    assert len({len(part) for part in accelerator._world.exchange([b.tolist() for b in loader])}) == 1
    assert loader.total_dataset_length == 9
    assert accelerator.prepare([1, 2]) == [1, 2]
    loader.even_batches = False
    world = accelerator._world
    assert sum(world.exchange(sum(len(batch) for batch in loader))) == 21
    _announced(size)
    _joined(size)


def _parcels(rank: int, size: int) -> None:
    world = Ranks(timeout_s=2)
    data = torch.arange(40, dtype=torch.uint8)
    for source in (0, size - 1):
        parcels = [(f"for {other}".encode(), data[: other * 10]) for other in range(size)]
        words, received = world.scatter(parcels if rank == source else None, source)
        assert words == f"for {rank}".encode()
        assert torch.equal(received, data[: rank * 10])
    # Who gets none doesn't come.
    if rank == 0:
        words, received = world.scatter([None, (b"one", data), *[None] * (size - 2)])
        assert (words, len(received)) == (b"", 0)
    elif rank == 1:
        assert world.scatter(None)[0] == b"one"
    world.barrier()
    if rank:
        with pytest.raises(RankMissingError, match="rank 0 has ended, or did not come within 2 s") as caught:
            world.scatter(None)
        assert caught.value.ranks == (0,)
    Ranks(timeout_s=60).barrier()


def _joined(size: int) -> None:
    """Inside, ranks train on what there is; outside, on equally many batches again."""
    for stream in (False, True):
        accelerator, loader = prepared(plain(stream, 4 * size + 2, 4))
        model = accelerator.prepare(torch.nn.Linear(1, 1))
        world = accelerator._world
        with accelerator.join_uneven_inputs([model], even_batches=False):
            sizes = []
            for batch in loader:
                accelerator.backward(model(batch[:, None].float()).sum())
                sizes.append(len(batch))
        assert world.exchange(sizes) == [[4, 2], *[[4]] * (size - 1)]
        assert len(set(world.exchange(len(list(loader))))) == 1
        assert loader.even_batches


class Told(Dataset[Any]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return self.epoch


def _announced(size: int) -> None:
    dataset = Told()
    _, loader = prepared(DataLoader(dataset, 8 // size))
    assert [batch.tolist()[0] for _ in range(3) for batch in loader] == [0, 1, 2]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_loaders_on_ranks(size: int) -> None:
    run_ranks(Path(__file__), "check", size)
