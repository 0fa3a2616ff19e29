"""Who holds what, and what a machine has; pure."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.errors import UsageError
from keepstep.tune.executors.machine import gpu_names, parse_gpu_list
from keepstep.tune.executors.resources import Pool


def test_ten_tenths_are_one() -> None:
    pool = Pool({"cpu": 1.0, "gpu": 1})
    grants = [pool.take({"cpu": 0.1, "gpu": 0.1}) for _ in range(10)]
    assert not pool.fits({"cpu": 0.0001})
    for grant in grants:
        pool.give_back(grant)
    assert pool.free == {"cpu": 1.0, "gpu": 1.0}


def test_parts_go_to_the_fullest_gpu_and_leave_whole_ones_whole() -> None:
    pool = Pool({"gpu": 3}, ["a", "b", "c"])
    first, second, third = (pool.take({"gpu": part}) for part in (0.6, 0.6, 0.4))
    assert [list(grant.devices) for grant in (first, second, third)] == [["a"], ["b"], ["a"]]
    assert pool.fits({"gpu": 0.4})
    assert pool.fits({"gpu": 1})
    assert not pool.fits({"gpu": 2})  # two GPUs' worth is free, but on three of them
    assert list(pool.take({"gpu": 1}).devices) == ["c"]


def test_what_the_machine_has_not_never_fits() -> None:
    pool = Pool({"cpu": 2.0})
    assert not pool.fits({"gpu": 0.1})
    assert not pool.fits({"tpu": 1})
    assert not pool.fits({"cpu": 2.5})
    with pytest.raises(UsageError, match=r"only .* is free"):
        pool.take({"cpu": 2.5})
    several = Pool({"gpu": 3.0})
    assert several.why_never({"gpu": 2}) is None
    assert several.why_never({"gpu": 0.5}) is None
    assert "a part of one GPU can be held, or several whole ones" in (several.why_never({"gpu": 1.5}) or "")
    with pytest.raises(UsageError, match="2 GPUs in total, but 1 names"):
        Pool({"gpu": 2}, ["0"])


@given(st.lists(st.tuples(st.sampled_from([0.25, 0.3, 0.5, 1.0, 2.0]), st.booleans()), max_size=30))
def test_no_gpu_is_given_out_twice_whatever_comes_and_goes(wishes: list[tuple[float, bool]]) -> None:
    pool = Pool({"gpu": 3})
    held = []
    for wish, give_back in wishes:
        if give_back and held:
            pool.give_back(held.pop(0))
        if pool.fits({"gpu": wish}):
            held.append(pool.take({"gpu": wish}))
        for device in "012":
            assert sum(grant.devices.get(device, 0) for grant in held) <= 10_000
    for grant in held:
        pool.give_back(grant)
    assert pool.free == {"gpu": 3.0}


def test_gpus_are_those_that_may_be_seen(tmp_path: Path) -> None:
    assert gpu_names("2, GPU-abc") == ("2", "GPU-abc")
    assert gpu_names("") == gpu_names("-1") == ()
    assert gpu_names(None, tmp_path) == ()
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert gpu_names(None, tmp_path) == ("0",)


def test_parts_of_a_divided_gpu_count_each() -> None:
    listed = (
        "GPU 0: NVIDIA A100 (UUID: GPU-1)\n"
        "  MIG 1g.5gb Device 0: (UUID: MIG-a)\n"
        "  MIG 1g.5gb Device 1: (UUID: MIG-b)\n"
        "GPU 1: NVIDIA A100 (UUID: GPU-2)\n"
    )
    assert parse_gpu_list(listed) == ("MIG-a", "MIG-b", "1")
    assert parse_gpu_list("No devices found\n") == ()
