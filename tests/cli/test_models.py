"""`keepstep estimate-memory` and `keepstep merge-weights` on files of other programs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result
from tests.cli.processes import run
from transformers import BertConfig, BertModel

from keepstep import save_directory
from keepstep.cli.main import main


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def small_bert() -> BertModel:
    return BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
        )
    )


def test_weights_and_configuration_give_the_same_estimate(workdir: Path) -> None:
    model = small_bert()
    model.config.save_pretrained("config")
    model.save_pretrained("weights", max_shard_size="60KB")
    assert len(list(Path("weights").glob("*.safetensors"))) > 1
    count = sum(parameter.numel() for parameter in model.parameters())
    largest = sum(p.numel() for p in model.encoder.layer[0].parameters())
    largest = max(largest, *(p.numel() for p in model.embeddings.parameters()))
    for path in ("config", "weights"):
        result = invoke("estimate-memory", path, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.output)
        assert found["parameters"] == count
        rows = {row["dtype"]: row for row in found["dtypes"]}
        assert list(rows) == ["float32", "float16", "bfloat16", "int8", "int4"]
        assert rows["float32"] == {
            "dtype": "float32",
            "largest_layer": 4 * largest,
            "total": 4 * count,
            "training": 16 * count,
        }
        assert (rows["int4"]["total"], rows["int4"]["training"]) == (count // 2, None)
        assert rows["bfloat16"]["training"] == 18 * count


def test_an_estimate_of_safetensors_imports_no_torch(workdir: Path) -> None:
    safetensors.torch.save_file({"h.0.a.weight": torch.ones(10), "h.0.b": torch.ones(2)}, "m.safetensors")
    done = run("estimate-memory", "m.safetensors", "--dtypes", "float32,int8")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "12 numbers in 2 tensors",
        "",
        "dtype    largest layer  total  training with Adam",
        "float32           48 B   48 B               192 B",
        "int8              12 B   12 B                   -",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none", None, "is no model"),
        ("a.safetensors", b"\xff" * 20, "no whole safetensors file"),
        ("a.safetensors", b"\x05", "no whole safetensors file"),
        ("config.json", b'{"model_type": "no such type"}', "transformers cannot make a model"),
    ],
)
def test_what_is_no_model_is_one_line(workdir: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    result = invoke("estimate-memory", name)
    assert result.exit_code == 2
    assert words in result.output
    assert invoke("estimate-memory", name, "--dtypes", "float7").exit_code == 2


def test_shards_of_torchs_own_checkpoints_become_a_model_that_transformers_loads(workdir: Path) -> None:
    model = small_bert()
    state = {"model": model.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id="checkpoint/pytorch_model_fsdp_0", no_dist=True)
    for source in ("checkpoint", "checkpoint/pytorch_model_fsdp_0"):
        result = invoke("merge-weights", source, "out")
        assert result.exit_code == 0, result.output
    model.config.save_pretrained("out")
    loaded = BertModel.from_pretrained("out")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_keepsteps_is_merged(workdir: Path) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_directory("saved", {"model": weights, "optimizer": {"lr": 0.1}})
    result = invoke("merge-weights", "saved", "out", "--max-shard-size", "20")
    assert result.exit_code == 0, result.output
    assert "2 tensors written to out" in result.output
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    merged = {}
    for name in set(index["weight_map"].values()):
        merged |= safetensors.torch.load_file(Path("out") / name)
    assert set(merged) == set(weights)
    assert all(torch.equal(value, merged[name]) for name, value in weights.items())


class Harmful:
    """Its pickle would make a file when it is read as pickles usually are."""

    def __reduce__(self) -> object:
        return Path.touch, (Path("harmed"),)


def test_metadata_that_would_run_code_are_refused(workdir: Path) -> None:
    dcp.save({"model": {"a": torch.ones(2)}}, checkpoint_id="shards", no_dist=True)
    Path("shards/.metadata").write_bytes(pickle.dumps(Harmful()))
    result = invoke("merge-weights", "shards", "out")
    assert result.exit_code == 2
    assert "would run code" in result.output
    assert not Path("harmed").exists()


def test_shards_that_are_missing_or_cut_off(workdir: Path) -> None:
    dcp.save({"model": {"a": torch.ones(2000)}}, checkpoint_id="shards", no_dist=True)
    [shard] = Path("shards").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    for _ in ("cut off", "missing"):
        result = invoke("merge-weights", "shards", "out")
        assert result.exit_code == 2, result.output
        assert "cannot be read" in result.output
        shard.unlink(missing_ok=True)
    assert invoke("merge-weights", "nothing", "out").exit_code == 2
    assert not Path("out").exists()
