"""docs/format.md says what is on disk: its samples are made anew, its digests recomputed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import xxhash

from keepstep import Store
from keepstep.checkpoint.format.manifest import dump_state
from keepstep.checkpoint.saving.layout import tensor_entries
from keepstep.checkpoint.saving.ranks import Shard, layout_of, plan_ranks
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.tune import Checkpoint
from keepstep.tune.saving import Saver

PAGE = Path(__file__).resolve().parent.parent / "docs" / "format.md"
DIFFERS_BY_RUN = {"id", "created_at", "run", "environment", "self_digest"}


def save_sample(root: Path) -> Path:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    state = {
        "model": {"head.weight": weight, "embedding.weight": weight},
        "progress": {"seen": (3, 1), "best": float("inf"), "buckets": {8: "small"}},
    }
    checkpoint = Store(root).save(state, step=3, epoch=0, metrics={"loss": 0.5}, tags=["baseline"])
    return checkpoint.path


def samples_in_page() -> list[Any]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)]


def test_the_samples_in_the_page_are_what_is_written(tmp_path: Path) -> None:
    directory = save_sample(tmp_path)
    shown_manifest, _, shown_state, _ = samples_in_page()
    manifest = json.loads((directory / "manifest.json").read_text())
    assert list(shown_manifest) == list(manifest)
    assert list(shown_manifest["environment"]) == list(manifest["environment"])
    for member in set(manifest) - DIFFERS_BY_RUN:
        assert shown_manifest[member] == manifest[member], member
    assert shown_state == json.loads((directory / "state.json").read_text())


def test_the_sample_of_a_sharded_tensor_is_what_two_ranks_write() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    shards = [
        Shard("model/head.weight", "model", "head.weight", "float32", 4, (2, 2), (row, 0), (1, 2))
        for row in (0, 1)
    ]
    plan = plan_ranks([], [[shard] for shard in shards])
    reports = []
    for shard, (share,) in zip(shards, plan.shares, strict=True):
        layout = layout_of([share], [shard.info], [])
        digest = xxhash.xxh3_128_hexdigest(weight[shard.at[0]].numpy().tobytes())
        reports.append(Report.of(tensor_entries([shard.info], layout, {0: digest}), {}, [shard]))
    written = json.loads(dump_state(None, merge(reports)[1]))
    assert samples_in_page()[3] == written["tensors"]


def test_the_sample_of_what_was_handed_over_is_what_is_written(tmp_path: Path) -> None:
    given = tmp_path / "given"
    for name in ("tokenizer", "logs"):
        (given / name).mkdir(parents=True)
    (given / "model.pt").write_bytes(b"weights")
    (given / "tokenizer" / "vocab.txt").write_bytes(b"a b\n")
    Saver(str(tmp_path / "trial")).save(Checkpoint(given), iteration=1, metrics={})
    written = json.loads((tmp_path / "trial" / "checkpoint_000000" / "manifest.json").read_text())
    assert samples_in_page()[1] == {name: written[name] for name in ("files", "directories")}


def test_every_kind_in_the_page_is_known_and_every_known_kind_is_in_the_page() -> None:
    from keepstep.tree.decode import KINDS

    table = PAGE.read_text().split("begins with `$`:")[1].split("## Write order")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `$")]
    named = {kind for cell in first_cells for kind in re.findall(r"`(\$\w+)`", cell)}
    assert named == set(KINDS)


def test_digests_are_what_the_page_says(tmp_path: Path) -> None:
    directory = save_sample(tmp_path)
    text = (directory / "manifest.json").read_bytes()
    manifest = json.loads(text)
    said = manifest["self_digest"].encode()
    assert xxhash.xxh3_128_hexdigest(text.replace(said, b"0" * 32)) == said.decode()

    state_bytes = (directory / "state.json").read_bytes()
    assert xxhash.xxh3_128_hexdigest(state_bytes) == manifest["files"]["state.json"]["digest"]
    assert len(state_bytes) == manifest["files"]["state.json"]["bytes"]

    entry = manifest["files"]["model.safetensors"]
    data = (directory / "model.safetensors").read_bytes()
    header = data[: entry["header_bytes"]]
    tensor = json.loads(state_bytes)["tensors"]["model/head.weight"]
    inside = data[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
    assert xxhash.xxh3_128_hexdigest(inside) == tensor["digest"]
    raw = xxhash.xxh3_128_digest(header) + bytes.fromhex(tensor["digest"])
    assert xxhash.xxh3_128_hexdigest(raw) == entry["digest"]
    assert entry["header_bytes"] % 4096 == 0


def test_other_tools_read_the_segments(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    loaded = load_file(save_sample(tmp_path) / "model.safetensors")
    assert loaded["head.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
