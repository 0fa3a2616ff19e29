from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.train.runs import CountedLoads, Noisy, attempt, plain_script
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from keepstep import Accelerator, skip_first_batches
from keepstep.errors import UsageError
from keepstep.models.moving import send_to_device
from keepstep.train.data.dealing import deal
from keepstep.train.placement import MoveTo


def order(loader: Any) -> list[list[int]]:
    return [indices.tolist() for _, indices in loader]


def test_looks_like_the_loader_it_was_made_from() -> None:
    plain = DataLoader(Noisy(), 4, shuffle=True, num_workers=2)
    loader = Accelerator(cpu=True).prepare(plain)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 6
    assert loader.dataset is plain.dataset
    assert loader.batch_size == loader.total_batch_size == 4
    assert loader.num_workers == 2
    with pytest.raises(AttributeError, match="no_such"):
        _ = loader.no_such


def test_loads_no_sample_twice_and_none_ahead() -> None:
    dataset = CountedLoads()
    loader = Accelerator(cpu=True).prepare(DataLoader(dataset, 4, shuffle=True))
    iterator = iter(loader)
    next(iterator)
    assert dataset.loads == 4


def test_a_profile_tells_how_long_each_batch_took() -> None:
    loader = Accelerator(cpu=True).prepare(DataLoader(Noisy(), 4))
    batches = iter(loader)
    next(batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        next(batches)
        next(batches)
    counts = [e.count for e in profile.key_averages() if e.key.startswith("enumerate(DataLoader)#")]
    assert counts == [2]


def test_seeking_loads_nothing(tmp_path: Path) -> None:
    project = tmp_path / "run"
    attempt(plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True)), project, 4)
    dataset = CountedLoads()
    attempt(plain_script(lambda: DataLoader(dataset, 4, shuffle=True), epochs=1), project)
    assert dataset.loads == 22 - 16


def test_skipping_is_absolute(tmp_path: Path) -> None:
    script = plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True), epochs=1)
    _, entries = attempt(script, tmp_path / "whole")
    attempt(script, tmp_path / "stopped", 2)
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True, project_dir=tmp_path / "stopped")
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(Noisy(), 4, shuffle=True), scheduler
    )
    accelerator.resume()
    rest = skip_first_batches(loader, 2)
    assert len(rest) == 4
    assert rest.dataset is loader.dataset
    assert order(rest) == [entry[1] for entry in entries[2:]]
    assert len(order(loader)) == len(order(rest)) == 6


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": None}])
def test_skipping_in_a_plain_loader(workers: int, options: dict[str, Any]) -> None:
    dataset = CountedLoads(12)
    plain = DataLoader(dataset, num_workers=workers, **options)
    view = accelerator_skip(plain, 2)
    whole = len(plain)
    assert len(view) == whole - 2
    assert len(list(view)) == whole - 2
    assert dataset.loads <= 12 - 2
    assert len(list(plain)) == len(list(view)) == whole
    assert len(list(skip_first_batches(range(5), 3))) == 2


def test_a_progress_bar_around_a_skipping_loader_shows_the_rest() -> None:
    plain = DataLoader(Noisy(), 4, shuffle=True)
    loader = Accelerator(cpu=True).prepare(plain)
    whole = order(loader)
    for _ in range(2):  # `tqdm.auto` asks for two iterators, and uses the second
        loader.set_epoch(0)
        view = skip_first_batches(loader, 4)
        assert order(tqdm(view, disable=True)) == whole[4:]
        assert len(order(tqdm(view, disable=True))) == len(whole)
    assert len(list(tqdm(skip_first_batches(plain, 4), disable=True))) == len(whole) - 4


def accelerator_skip(loader: Any, count: int) -> Any:
    return Accelerator.skip_first_batches(loader, count)


def test_a_negative_skip_is_refused() -> None:
    with pytest.raises(UsageError, match="-1"):
        skip_first_batches(DataLoader(Noisy()), -1)


def test_set_epoch_keeps_a_pass_that_is_to_be_continued(tmp_path: Path) -> None:
    script = plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True))
    _, entries = attempt(script, tmp_path / "whole")
    attempt(script, tmp_path / "stopped", 8)

    def with_set_epoch(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        epochs = accelerator.epochs

        def announced(count: int) -> Any:
            for epoch in epochs(count):
                accelerator._state.loaders[0].set_epoch(epoch)
                yield epoch

        accelerator.epochs = announced  # type: ignore[method-assign]
        return script(accelerator, tape)

    assert attempt(with_set_epoch, tmp_path / "stopped")[1] == entries[8:]


def test_batches_move_as_a_whole() -> None:
    class Pair(NamedTuple):
        left: Any
        right: Any

    class Movable:
        place = "here"

        def to(self, device: torch.device) -> Movable:
            moved = Movable()
            moved.place = str(device)
            return moved

    batch = {
        "list": [torch.ones(2), "text"],
        "pair": Pair(torch.ones(1), (3, torch.zeros(1))),
        "ordered": OrderedDict(a=torch.ones(1)),
        "default": defaultdict(list, a=torch.ones(2, 1)),
        "object": Movable(),
    }
    moved = MoveTo(torch.device("meta"))(batch)
    assert moved["list"][0].is_meta
    assert moved["list"][1] == "text"
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].right[1].is_meta
    assert isinstance(moved["ordered"], OrderedDict)
    assert moved["ordered"]["a"].is_meta
    assert type(moved["default"]) is defaultdict
    assert moved["default"].default_factory is list
    (first, second), real = deal([batch["default"]], 2, split=False, even=True)
    assert (first["a"].shape, type(second), real) == ((1, 1), defaultdict, 0)
    assert moved["object"].place == "meta"
    assert send_to_device(None, torch.device("meta")) is None
