"""Sharded tensors in state.json: what is whole is taken, anything else refused."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from keepstep.checkpoint.format.boxes import Box, meeting, problem_of_tiling
from keepstep.checkpoint.format.manifest import FileEntry, Manifest, TensorEntry, dump_state
from keepstep.checkpoint.format.parse import parse_state
from keepstep.errors import ManifestError

DIGEST = "0" * 32


def manifest(size: int) -> Manifest:
    return Manifest(
        id="x", created_at="", step=None, epoch=None, metrics={}, tags=(), pinned=False, parent=None, run="r",
        attempt=1, environment={},
        files={"w.safetensors": FileEntry(bytes=4096 + size, digest=DIGEST, header_bytes=4096)},
    )  # fmt: skip


def chunk(at: list[int], shape: list[int], offset: int, **changes: Any) -> dict[str, Any]:
    count = 1
    for size in shape:
        count *= size
    node = {"at": at, "shape": shape, "offset": offset, "file": "w.safetensors", "bytes": 4 * count}
    return {**node, "digest": DIGEST, **changes}


def parse(shape: list[int], chunks: Any, **more: Any) -> TensorEntry:
    node = {"dtype": "float32", "shape": shape, "chunks": chunks}
    size = sum(c["bytes"] for c in chunks if isinstance(c, dict))
    text = json.dumps({"schema": 1, "tensors": {"w/value": node, **more}, "tree": None})
    return parse_state(Path("c"), text.encode(), manifest(size)).tensors["w/value"]


def test_a_sharded_tensor_is_read_back_as_it_was_written() -> None:
    chunks = [chunk([0, 0], [3, 2], 4096), chunk([0, 2], [2, 3], 4120), chunk([2, 2], [1, 3], 4144)]
    entry = parse([3, 5], chunks)
    assert entry.bytes == 60
    assert [(c.at, c.shape, c.offset) for c in entry.chunks] == [
        ((0, 0), (3, 2), 4096), ((0, 2), (2, 3), 4120), ((2, 2), (1, 3), 4144),
    ]  # fmt: skip
    written = json.loads(dump_state(None, {"w/value": entry}))
    assert written["tensors"]["w/value"] == {"dtype": "float32", "shape": [3, 5], "chunks": chunks}


LEFT, RIGHT = chunk([0, 0], [2, 1], 4096), chunk([0, 1], [2, 1], 4104)
BAD = {
    "no chunks": [],
    "hole": [LEFT],
    "overlap": [LEFT, chunk([0, 0], [2, 1], 4104)],
    "outside": [LEFT, chunk([0, 2], [2, 1], 4104)],
    "reaching out": [LEFT, chunk([1, 1], [2, 1], 4104)],
    "empty chunk": [LEFT, RIGHT, chunk([0, 0], [0, 2], 4112)],
    "dimensions": [LEFT, chunk([0], [2], 4104)],
    "size": [LEFT, {**RIGHT, "bytes": 4}],
    "file": [LEFT, {**RIGHT, "file": "../w.safetensors"}],
    "digest": [LEFT, {**RIGHT, "digest": "00"}],
    "negative": [LEFT, {**RIGHT, "at": [0, -1]}],
    "no numbers": [LEFT, {**RIGHT, "at": [0, True]}],
    "over each other in the file": [LEFT, {**RIGHT, "offset": 4096}],
    "no object": [LEFT, 3],
    "huge": [LEFT, chunk([0, 1], [2, 1], 4104), chunk([2**61, 0], [1, 1], 4112)],
}


@pytest.mark.parametrize("what", BAD)
def test_chunks_that_are_not_the_tensor_are_refused(what: str) -> None:
    with pytest.raises(ManifestError):
        parse([2, 2], BAD[what])
    assert parse([2, 2], [LEFT, RIGHT]).chunks


def test_chunks_are_a_list_and_no_alias_points_into_them() -> None:
    with pytest.raises(ManifestError):
        parse([2, 2], {"0": LEFT, "1": RIGHT})
    alias = {"dtype": "float32", "shape": [1], "stride": [1], "offset": 0, "alias_of": "w/value"}
    with pytest.raises(ManifestError, match="no stored tensor"):
        parse([2, 2], [LEFT, RIGHT], **{"w/alias": alias})


def cut(box: Box, rng: random.Random, times: int) -> list[Box]:
    """Boxes that repeated straight cuts give."""
    boxes = [box]
    for _ in range(times):
        victim = boxes.pop(rng.randrange(len(boxes)))
        dimension = rng.randrange(len(victim.shape))
        if victim.shape[dimension] < 2:
            boxes.append(victim)
            continue
        first = rng.randrange(1, victim.shape[dimension])
        at, shape = list(victim.at), list(victim.shape)
        shape[dimension] = first
        boxes.append(Box(tuple(at), tuple(shape)))
        at[dimension] += first
        shape[dimension] = victim.shape[dimension] - first
        boxes.append(Box(tuple(at), tuple(shape)))
    rng.shuffle(boxes)
    return boxes


@pytest.mark.parametrize("seed", range(30))
def test_what_cuts_give_is_whole_and_one_box_moved_is_not(seed: int) -> None:
    rng = random.Random(seed)
    whole = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(1, 4)))
    boxes = cut(Box((0,) * len(whole), whole), rng, 12)
    assert problem_of_tiling(whole, boxes) is None
    assert problem_of_tiling(whole, boxes[1:]) is not None
    assert problem_of_tiling(whole, [*boxes, boxes[0]]) is not None
    if len(boxes) > 1:
        moved = [Box(boxes[1].at, boxes[0].shape), *boxes[1:]]
        assert problem_of_tiling(whole, moved) is not None


def test_a_hostile_number_of_boxes_is_answered_quickly() -> None:
    stairs = [Box((n, n), (2, 2)) for n in range(20_000)]
    began = time.perf_counter()
    assert problem_of_tiling((20_001, 20_001), stairs) is not None
    pinwheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1))]
    assert problem_of_tiling((3, 3), [*pinwheel, Box((1, 1), (1, 1))]) is not None
    assert time.perf_counter() - began < 5


def test_where_boxes_meet() -> None:
    assert meeting(Box((0, 0), (2, 2)), Box((1, 0), (4, 1))) == Box((1, 0), (1, 1))
    assert meeting(Box((0,), (2,)), Box((2,), (2,))) is None
    assert meeting(Box((), ()), Box((), ())) == Box((), ())
