"""The plan of a checkpoint's files: aligned, without holes, each byte once, readable by safetensors."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.checkpoint.format.manifest import DATA_ALIGNMENT_BYTES, ITEMSIZES
from keepstep.checkpoint.format.names import is_handed_over, problem_of_name
from keepstep.checkpoint.saving.layout import Layout, TensorInfo, plan
from keepstep.checkpoint.saving.planner import Planner


def info(
    name: str, shape: tuple[int, ...] = (3,), *, dtype: str = "float32", group: str = "model", **more: object
) -> TensorInfo:
    stride = tuple(more.pop("stride", ()) or _dense(shape))  # type: ignore[arg-type]
    return TensorInfo(
        address=f"{group}/{name}",
        group=group,
        name=name,
        dtype=dtype,
        shape=shape,
        itemsize=ITEMSIZES[dtype],
        bytes=math.prod(shape) * ITEMSIZES[dtype],
        stride=stride,
        **more,  # type: ignore[arg-type]
    )


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def check(layout: Layout, tensors: list[TensorInfo]) -> None:
    """Everything that must hold of any layout."""
    placed = [p.index for s in layout.segments for p in s.placements]
    assert sorted(placed + [a.index for a in layout.aliases]) == list(range(len(tensors)))
    assert len({s.file.lower() for s in layout.segments}) == len(layout.segments)
    for segment in layout.segments:
        assert problem_of_name(segment.file) is None
        assert not is_handed_over(segment.file)
        assert len(segment.header) % DATA_ALIGNMENT_BYTES == 0
        position = len(segment.header)
        for placement in segment.placements:
            assert placement.offset == position
            assert placement.offset % tensors[placement.index].itemsize == 0
            assert placement.bytes == tensors[placement.index].bytes
            position += placement.bytes
        assert segment.bytes == position
        length = int.from_bytes(segment.header[:8], "little")
        assert length == len(segment.header) - 8
        header = json.loads(segment.header[8:])
        assert len(header) == len(segment.placements) + 1
    stored = set(placed)
    for alias in layout.aliases:
        assert alias.base in stored


groups = st.sampled_from(["model", "Model", "a/b", "a:b", "", "..", "x" * 200, "é", "model.safetensors"])
tensor_infos = st.lists(
    st.tuples(groups, st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(sorted(ITEMSIZES))),
    max_size=12,
).map(
    lambda rows: [
        info(f"t{i}", shape, dtype=dtype, group=group) for i, (group, shape, dtype) in enumerate(rows)
    ]
)


@given(tensor_infos, st.integers(1, 300))
def test_any_tensors(tensors: list[TensorInfo], limit: int) -> None:
    check(plan(tensors, segment_limit_bytes=limit), tensors)
    assert plan(tensors, segment_limit_bytes=limit) == plan(tensors, segment_limit_bytes=limit)


spans = st.lists(
    st.tuples(
        st.integers(0, 40),
        st.integers(1, 20),
        st.sampled_from(["uint8", "int16", "float32"]),
        st.integers(1, 3),
    ),
    min_size=2,
    max_size=8,
)


@given(spans)
def test_any_views_of_one_memory_stay_inside_their_base(rows: list[tuple[int, int, str, int]]) -> None:
    tensors = [
        info(
            f"t{i}",
            (size,),
            dtype=dtype,
            memory=(0, 1000),
            begin=1000 + begin * ITEMSIZES[dtype],
            stride=(step,),
            contiguous=step == 1 or size == 1,
        )
        for i, (begin, size, dtype, step) in enumerate(rows)
    ]
    layout = plan(tensors)
    check(layout, tensors)
    for alias in layout.aliases:
        base, view = tensors[alias.base], tensors[alias.index]
        reach = (view.shape[0] - 1) * alias.stride[0] * view.itemsize + view.itemsize
        assert alias.offset >= 0
        assert alias.offset + reach <= base.bytes
        assert alias.offset % view.itemsize == 0


def test_a_tied_tensor_is_stored_once() -> None:
    tensors = [info(n, (4, 4), memory=(0, 64), begin=64) for n in ("a", "b")]
    layout = plan(tensors)
    assert [alias.index for alias in layout.aliases] == [1]
    assert layout.segments[0].bytes == DATA_ALIGNMENT_BYTES + 64


def test_the_same_address_on_two_devices_is_no_tie() -> None:
    tensors = [info("a", memory=(1, 64), begin=64), info("b", memory=(2, 64), begin=64)]
    assert plan(tensors).aliases == ()


@pytest.mark.parametrize(("limit", "files"), [(1 << 20, 1), (100, 3), (1, 5)])
def test_groups_are_split_at_the_limit(limit: int, files: int) -> None:
    tensors = [info(f"t{i}", (12,)) for i in range(5)]
    layout = plan(tensors, segment_limit_bytes=limit)
    assert len(layout.segments) == files
    assert (layout.indexes == {}) == (files == 1)
    if files > 1:
        index = json.loads(layout.indexes["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) == {s.file for s in layout.segments}
        assert index["metadata"]["total_size"] == 240


def test_names_of_split_groups_never_meet_those_of_others() -> None:
    tensors = [info(f"t{i}", (12,)) for i in range(2)]
    tensors.append(info("x", group="model-00001-of-00002"))
    check(plan(tensors, segment_limit_bytes=50), tensors)


class TestPlansThatAreKept:
    """A plan is made anew when it would come out differently, and not otherwise."""

    @staticmethod
    def at(*addresses: int, **more: object) -> list[TensorInfo]:
        return [
            info(f"w{n}", memory=(-1, address), begin=address, **more) for n, address in enumerate(addresses)
        ]

    def test_tensors_that_lie_elsewhere_each_time_keep_it(self) -> None:
        planner = Planner()
        first = planner.plan(self.at(1000, 2000))
        assert planner.plan(self.at(1000, 3000)) is first
        assert planner.plan(self.at(5000, 4000)) is first

    @pytest.mark.parametrize(
        "changed",
        [
            {"shape": (4,)},
            {"shape": (3, 1)},
            {"dtype": "int32"},
            {"dtype": "float64", "shape": (3,)},
            {"group": "optimizer"},
        ],
        ids=str,
    )
    def test_tensors_that_are_others_do_not(self, changed: dict[str, object]) -> None:
        planner = Planner()
        planner.plan(self.at(1000, 2000))
        tensors = self.at(1000, 2000, **changed)
        check(planner.plan(tensors), tensors)
        assert planner.plan(tensors) == plan(tensors)

    def test_sharing_memory_that_begins_or_ends_is_seen(self) -> None:
        planner = Planner()
        apart, together = self.at(1000, 2000), self.at(1000, 1000)
        assert not planner.plan(apart).aliases
        assert [alias.index for alias in planner.plan(together).aliases] == [1]
        assert not planner.plan(self.at(3000, 4000)).aliases

    def test_a_large_part_that_is_frozen_from_now_on_has_a_file_of_its_own(self) -> None:
        large = (1 << 20,)
        trained = [info("head", memory=(-1, 1000)), info("base", large, memory=(-1, 9000))]
        planner = Planner()
        assert len(planner.plan(trained).segments) == 1
        assert len(planner.plan([trained[0], trained[1]._replace(frozen=True)]).segments) == 2
