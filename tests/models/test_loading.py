"""Weights into models, from every kind of file that users have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.networks import Network, logits, network
from torch import nn

import keepstep
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DigestError,
    ForeignTypeError,
    MismatchError,
    MissingFileError,
    UsageError,
)
from keepstep.models.empty import init_empty_weights, init_on_device
from keepstep.models.export import export_weights
from keepstep.models.loading import load_checkpoint_in_model
from keepstep.models.naming import find_tied_parameters, retie_parameters


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_one_file(model: nn.Module, directory: Path) -> Path:
    export_weights(model.state_dict(), directory)
    return directory / "model.safetensors"


def as_directory(model: nn.Module, directory: Path) -> Path:
    export_weights(model.state_dict(), directory, max_shard_size=600)
    return directory


def as_index(model: nn.Module, directory: Path) -> Path:
    return as_directory(model, directory) / "model.safetensors.index.json"


def as_plain_file(model: nn.Module, directory: Path) -> Path:
    """As tools write it that know nothing of ties: the tied weight under one name, no word of the other."""
    state = {name: value for name, value in model.state_dict().items() if name != "embedding.weight"}
    save_file(state, directory / "weights.safetensors")
    return directory / "weights.safetensors"


def as_torch_file(model: nn.Module, directory: Path) -> Path:
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def as_old_torch_file(model: nn.Module, directory: Path) -> Path:
    torch.save(model.state_dict(), directory / "old.pt", _use_new_zipfile_serialization=False)
    return directory / "old.pt"


def as_torch_shards(model: nn.Module, directory: Path) -> Path:
    items = list(model.state_dict().items())
    weight_map = {}
    for number, part in enumerate((items[:5], items[5:])):
        torch.save(dict(part), directory / f"pytorch_model-{number}.bin")
        weight_map.update({name: f"pytorch_model-{number}.bin" for name, _ in part})
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def as_checkpoint(model: nn.Module, directory: Path) -> Path:
    keepstep.save_directory(directory / "checkpoint", {"model": model, "optimizer": {"lr": 0.1}})
    return directory / "checkpoint"


def as_saved_object(model: nn.Module, directory: Path) -> Path:
    keepstep.Accelerator(cpu=True).save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


KINDS = [
    as_saved_object,
    as_one_file,
    as_directory,
    as_index,
    as_plain_file,
    as_torch_file,
    as_old_torch_file,
    as_torch_shards,
    as_checkpoint,
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_takes_weights_from(kind: Any, tmp_path: Path) -> None:
    source, model = network(1), network(2)
    path = kind(source, tmp_path)
    kept = model.embedding.weight
    load_checkpoint_in_model(model, path, strict=True)
    assert same_state(model, source)
    assert model.embedding.weight is kept is model.head.weight  # an optimizer still has the right ones


@pytest.mark.parametrize("kind", [as_one_file, as_plain_file, as_checkpoint])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": "disk"}])
def test_an_empty_model_takes_weights_and_keeps_its_ties(
    kind: Any, device_map: dict[str, str] | None, tmp_path: Path
) -> None:
    source = network(1)
    with init_empty_weights():
        model = Network().eval()
    keepstep.load_checkpoint_and_dispatch(
        model, kind(source, tmp_path), device_map, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(model), logits(source))
    if device_map != {"": "disk"}:
        assert find_tied_parameters(model) == [["embedding.weight", "head.weight"]]


def test_values_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    path = as_one_file(network(1), tmp_path)
    for device_map in (None, {"": "cpu"}):
        model = network(2)
        load_checkpoint_in_model(model, path, device_map, dtype="bfloat16", keep_in_fp32_modules=["norm"])
        assert model.embedding.weight.dtype is torch.bfloat16
        assert model.norm.weight.dtype is torch.float32
        assert model.head.weight is model.embedding.weight
    half = network(2).half()
    load_checkpoint_in_model(half, path)
    assert half.embedding.weight.dtype is torch.float16


def test_what_does_not_fit_is_all_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = as_one_file(network(1, width=8), tmp_path)
    model, before = network(2, width=6), network(2, width=6)
    with pytest.raises(MismatchError, match="nothing was changed") as caught:
        load_checkpoint_in_model(model, path)
    assert len(caught.value.different) == len(model.state_dict())
    assert same_state(model, before)


def test_missing_and_unexpected_names_are_warnings_or_with_strict_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = network(1).state_dict()
    del state["norm.bias"]
    export_weights({**state, "extra": torch.zeros(1)}, tmp_path)
    model = network(2)
    with caplog.at_level(logging.WARNING):
        load_checkpoint_in_model(model, tmp_path)
    assert "lacks norm.bias" in caplog.text
    assert "holds extra, which the model does not have" in caplog.text
    assert torch.equal(model.norm.weight, state["norm.weight"])
    with pytest.raises(MismatchError) as caught:
        load_checkpoint_in_model(model, tmp_path, strict=True)
    assert (caught.value.missing, caught.value.unexpected) == (("norm.bias",), ("extra",))


def test_damage_is_named(tmp_path: Path) -> None:
    path = as_directory(network(1), tmp_path)
    (shard,) = path.glob("model-00002*")
    data = shard.read_bytes()
    shard.write_bytes(data[:-8])
    with pytest.raises(DamagedCheckpointError, match="no whole safetensors file"):
        load_checkpoint_in_model(network(2), path)
    shard.unlink()
    with pytest.raises(MissingFileError, match="model-00002"):
        load_checkpoint_in_model(network(2), path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(DamagedCheckpointError, match="no file beside it"):
        load_checkpoint_in_model(network(2), path)
    index.write_text("{")
    with pytest.raises(DamagedCheckpointError, match="no index"):
        load_checkpoint_in_model(network(2), path)
    cut = tmp_path / "cut.pt"
    torch.save(network(1).state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(DamagedCheckpointError, match="cut off or damaged"):
        load_checkpoint_in_model(network(2), cut)


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = as_checkpoint(network(1), tmp_path)
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    model, before = network(2), network(2)
    with pytest.raises(DigestError):
        load_checkpoint_in_model(model, path)
    assert same_state(model, before)


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ForeignTypeError, match="would run code"):
        load_checkpoint_in_model(network(2), tmp_path)
    torch.save(network(1), tmp_path / "whole.pt")
    with pytest.raises(ForeignTypeError, match=r"would run code.*Network"):
        load_checkpoint_in_model(network(2), tmp_path / "whole.pt")
    assert capsys.readouterr().out == ""


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="holds no weights"):
        load_checkpoint_in_model(network(), tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint at"):
        load_checkpoint_in_model(network(), tmp_path / "nowhere")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="holds a list, not a state dict"):
        load_checkpoint_in_model(network(), tmp_path / "list.pt")
    with pytest.raises(UsageError, match="pass offload_folder"):
        load_checkpoint_in_model(network(), as_torch_file(network(), tmp_path), {"": "disk"})
    with pytest.raises(UsageError, match="expected a torch dtype or its name"):
        load_checkpoint_in_model(network(), as_torch_file(network(), tmp_path), dtype="float99")


def test_models_are_made_empty_or_on_a_device() -> None:
    with init_empty_weights():
        model = Network()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.blocks[0].shift.is_meta
    with init_empty_weights(include_buffers=True):
        model = Network()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with init_on_device("cpu"):
        assert not any(parameter.is_meta for parameter in Network().parameters())
    assert not nn.Linear(1, 1).weight.is_meta
    with pytest.raises(ZeroDivisionError), init_empty_weights():
        raise ZeroDivisionError
    assert not nn.Linear(1, 1).weight.is_meta


def test_parted_ties_are_made_again() -> None:
    model = network()
    ties = find_tied_parameters(model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert find_tied_parameters(model) == []
    retie_parameters(model, ties)
    assert model.head.weight is model.embedding.weight
