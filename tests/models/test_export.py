"""Weights written for others: which files there are, who can read them, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate.utils import load_checkpoint_in_model as load_with_accelerate
from safetensors.torch import load_file, load_model
from tests.checkpoint.faults import NO_SPACE, FaultyFiles, Killed
from tests.forked import run_program
from torch import nn

from keepstep.errors import DirectoryNotOursError, NoSpaceError, TensorNotSavableError, UsageError
from keepstep.files import LocalFiles
from keepstep.models.export import export_weights
from keepstep.models.shards import split
from keepstep.models.weights import read_weights

INDEX = "model.safetensors.index.json"


def weights(seed: int, layers: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(layers)}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_one_file_is_read_by_safetensors(tmp_path: Path) -> None:
    export_weights(weights(0), tmp_path / "out")
    assert names_in(tmp_path / "out") == ["model.safetensors"]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), weights(0))


def test_shards_are_read_by_accelerate(tmp_path: Path) -> None:
    export_weights(weights(0), tmp_path, max_shard_size="0.5KB")
    shards = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    assert names_in(tmp_path) == [*shards, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 256
    assert set(index["weight_map"].values()) == set(shards)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
    load_with_accelerate(model, str(tmp_path))
    assert same(model.state_dict(), weights(0))


@pytest.mark.parametrize("size", ["10GB", 200])
def test_tied_weights_are_written_once_and_come_back(tmp_path: Path, size: int | str) -> None:
    model, other = Tied(), Tied()
    export_weights(model.state_dict(), tmp_path, max_shard_size=size)
    stored = [name for path in tmp_path.glob("*.safetensors") for name in load_file(path)]
    assert sorted(stored) == sorted(set(model.state_dict()) - {"head.weight"})
    assert same(read_weights(tmp_path), model.state_dict())
    load_with_accelerate(other, str(tmp_path))
    assert same(other.state_dict(), model.state_dict())
    if size == "10GB":
        third = Tied()
        load_model(third, tmp_path / "model.safetensors")
        assert same(third.state_dict(), model.state_dict())


def test_views_of_one_memory_keep_their_own_values(tmp_path: Path) -> None:
    memory = torch.arange(8.0)
    views = {"all": memory, "first": memory[:4], "odd": memory[1::2], "turned": memory.reshape(2, 4).T}
    export_weights(views, tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), {k: v.contiguous() for k, v in views.items()})


@pytest.mark.parametrize("sizes", [("1KB", "10GB"), ("10GB", "1KB"), ("1KB", "1KB"), (300, 600), (600, 300)])
def test_a_second_export_leaves_nothing_of_the_first(tmp_path: Path, sizes: tuple[int | str, ...]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-of-mine.safetensors").write_text("not yours")
    (tmp_path / "model.fp16-00001-of-00002.safetensors").write_text("a variant")
    for seed, size in enumerate(sizes):
        export_weights(weights(seed, layers=9 - seed), tmp_path, max_shard_size=size)
    assert same(read_weights(tmp_path), weights(1, layers=8))
    fresh = tmp_path / "fresh"
    export_weights(weights(1, layers=8), fresh, max_shard_size=sizes[1])
    others = {"config.json", "fresh", "model-of-mine.safetensors", "model.fp16-00001-of-00002.safetensors"}
    assert set(names_in(tmp_path)) == {*names_in(fresh), *others}


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("sizes", [(300, 300), (300, "10GB"), ("10GB", 300)])
def test_a_kill_at_any_operation_leaves_the_old_weights_or_the_new(
    tmp_path: Path, sizes: tuple[int | str, int | str], power_cut: bool
) -> None:
    """And the next export cleans up whatever was left."""
    old, new, third = weights(0, 3), weights(1, 3), weights(2, 3)
    seen = set()
    for at in range(60):
        place = tmp_path / str(at)
        place.mkdir()
        export_weights(old, place, max_shard_size=sizes[0])
        faulty = FaultyFiles(at=at, power_cut=power_cut, graveyard=tmp_path / f"graves-{at}")
        with contextlib.suppress(Killed):
            export_weights(new, place, max_shard_size=sizes[1], files=faulty)
        found = read_weights(place)
        assert same(found, old) or same(found, new), f"a mix after operation {at}: {faulty.log}"
        seen.add(same(found, new))
        export_weights(third, place, max_shard_size=sizes[0])
        assert same(read_weights(place), third)
        assert not [name for name in names_in(place) if name.startswith((".keepstep", "model-next"))]
        if not faulty.dead:
            break
    else:
        pytest.fail("the export never came to its end")
    assert seen == {False, True}


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path) -> None:
    export_weights(weights(0), tmp_path)
    with pytest.raises(NoSpaceError, match="no space"):
        export_weights(weights(1), tmp_path, files=FaultyFiles(at=0, error=NO_SPACE))
    assert names_in(tmp_path) == ["model.safetensors"]
    assert same(read_weights(tmp_path), weights(0))


def test_a_disk_that_is_full_in_the_middle_is_told_so(tmp_path: Path) -> None:
    """Files may have no more than 1000 bytes here."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "import keepstep\n"
        "from keepstep.errors import StoreError\n"
        "from keepstep.models.export import export_weights\n"
        "from keepstep.models.objects import save_object\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for save in (export_weights, lambda state, place: save_object(state, place / 'f')):\n"
        "    try: save({'a': torch.zeros(1000)}, Path(sys.argv[1]))\n"
        "    except StoreError as error: assert 'File too large' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    done = run_program(code, tmp_path)
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_reader_prefers_is_told_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(weights(5), tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING):
        export_weights(weights(0), tmp_path)
    assert "pytorch_model.bin" in caplog.text
    assert same(read_weights(tmp_path), weights(0))


def test_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never writes"):
        export_weights(weights(0), tmp_path, safe_serialization=False)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("size", ["1XB", "GB", "", -1, True, 1.5])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="is no size"):
        export_weights(weights(0), tmp_path, max_shard_size=size)


def test_a_checkpoint_and_a_file_are_no_place_for_an_export(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryNotOursError, match="is a file"):
        export_weights(weights(0), tmp_path / "file")
    LocalFiles().write_file(tmp_path / "manifest.json", b"{}")
    LocalFiles().write_file(tmp_path / "state.json", b"{}")
    with pytest.raises(DirectoryNotOursError, match="is a checkpoint"):
        export_weights(weights(0), tmp_path)


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(TensorNotSavableError, match="'extra' is a dict"):
        export_weights({"extra": {}}, tmp_path)
    with pytest.raises(TensorNotSavableError, match="'w' is on the meta device"):
        export_weights({"w": torch.empty(2, device="meta")}, tmp_path)


def test_a_file_may_be_as_large_as_was_said() -> None:
    assert split([("a", 6), ("b", 4), ("c", 1)], 10) == [["a", "b"], ["c"]]
