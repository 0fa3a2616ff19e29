"""Trees of tensors in one process, side by side with Accelerate's functions."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import accelerate
import accelerate.utils as theirs
import pytest
import torch

import keepstep.utils as ours
from keepstep import Accelerator
from keepstep.errors import NotTensorError, UsageError
from keepstep.local_sgd import LocalSGD


class Pair(NamedTuple):
    left: Any
    right: Any


TREE = {
    "a": torch.arange(6.0).reshape(3, 2),
    "b": [Pair(torch.ones(3, dtype=torch.bfloat16), "text"), (torch.zeros(3, 1).half(), None)],
    "c": OrderedDict(z=torch.arange(3)),
}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first).__name__ == type(second).__name__ and repr(first) == repr(second)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convert_to_fp32", (TREE,)),
        ("slice_tensors", (TREE, slice(1, 3))),
        ("listify", (TREE,)),
        ("find_batch_size", (TREE,)),
        ("find_batch_size", ([TREE],)),
        ("find_device", (TREE,)),
        ("find_device", ({"a": "none"},)),
        ("get_data_structure", (TREE,)),
        ("ignorant_find_batch_size", ({},)),
        ("ignorant_find_batch_size", (["text"],)),
        ("concatenate", ([{"x": [torch.ones(2)]}, {"x": [torch.zeros(1)]}],)),
        ("concatenate", ([Pair(torch.ones(2, 1), torch.ones(2, 2))] * 2, 1)),
        ("concatenate", (["alone"],)),
        ("is_namedtuple", (Pair(1, 2),)),
        ("is_namedtuple", ((1, 2),)),
        ("is_torch_tensor", (TREE,)),
        ("honor_type", (Pair(1, 2), iter("ab"))),
        ("honor_type", ([1], iter("ab"))),
    ],
)
def test_results_are_accelerates(name: str, arguments: tuple[Any, ...]) -> None:
    given = [*arguments]
    if name == "honor_type":  # an iterator can be used once
        assert ours.honor_type(arguments[0], iter("ab")) == theirs.honor_type(arguments[0], iter("ab"))
        return
    assert same(getattr(ours, name)(*given), getattr(theirs, name)(*given))


def test_structures_become_tensors_again() -> None:
    made = ours.initialize_tensors(ours.get_data_structure({"x": torch.ones(2, 3, dtype=torch.int8)}))
    assert (made["x"].shape, made["x"].dtype) == ((2, 3), torch.int8)


def test_functions_get_arguments_and_other_leaves_stay_or_are_told() -> None:
    done = ours.recursively_apply(lambda t, by, plus=0: t * by + plus, TREE, 2, plus=1)
    assert torch.equal(done["a"], TREE["a"] * 2 + 1)  # type: ignore[operator]
    assert done["b"][0].right == "text"
    with pytest.raises(NotTensorError, match=r"\['b'\]\[0\]\[1\] is of type str \('text'\)"):
        ours.recursively_apply(torch.clone, TREE, error_on_other_type=True)
    with pytest.raises(TypeError, match="only tensors can be"):
        ours.concatenate([1, 2])
    with pytest.raises(UsageError, match="expected a list or tuple of at least one tree"):
        ours.concatenate([])
    with pytest.raises(UsageError, match="without a tensor"):
        ours.find_batch_size({})
    with pytest.raises(TypeError, match="its argument is 3; expected a tensor with rows"):
        ours.find_batch_size(3)


def test_what_a_function_returns_is_converted() -> None:
    @ours.convert_outputs_to_fp32
    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Doc."""
        return {"y": x.half(), "n": x.long()}

    assert [t.dtype for t in forward(torch.ones(1)).values()] == [torch.float32, torch.int64]
    assert forward.__doc__ == "Doc."


def test_one_process_gets_what_accelerate_gives_it() -> None:
    other, mine = accelerate.PartialState(cpu=True), Accelerator(cpu=True)
    tensors = {"a": torch.tensor(2.0), "b": [torch.arange(3)]}
    for name in ("gather", "reduce", "broadcast", "pad_across_processes"):
        assert same(getattr(ours, name)(tensors), getattr(theirs, name)(tensors)), name
    assert same(mine.gather_for_metrics(tensors), tensors)
    for value in (["x", 1], {"x": 1}, "text"):
        assert ours.gather_object(value) == theirs.gather_object(value)
        with mine.split_between_processes(value) as part, other.split_between_processes(value) as theirs_:
            assert part == theirs_ == value
    assert ours.broadcast_object_list(["x"], from_process=0) == ["x"]
    assert mine.gather_for_metrics(["x"]) == ["x"]
    assert mine.on_process(process_index=3)(lambda: "runs")() == "runs"
    mine.set_trigger()
    assert [mine.check_trigger(), mine.check_trigger()] == [True, False]
    with pytest.raises(TypeError, match="reduce: its argument is of type float"):
        mine.reduce(0.5)
    with LocalSGD(mine, torch.nn.Linear(1, 1), local_sgd_steps=4) as local_sgd:
        local_sgd.step()
