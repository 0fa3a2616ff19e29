"""Checkpoints of trials, by every executor: made, told, gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tests.tune.executors.driving import Drive, Ended, Failed, Go, Reported, Saved, Stop

from keepstep.tune import Checkpoint

Drives = Callable[..., Drive]


def test_a_function_goes_on_from_the_checkpoint_that_it_reported(drive: Drives) -> None:
    d = drive()
    results, _ = d.run("t", {"do": "checkpoint"})
    assert [e.checkpoint.name for e in results] == ["checkpoint_000000", "checkpoint_000001"]
    assert all(e.checkpoint.bytes > 0 for e in results)
    last = d.root / "t" / "checkpoint_000001"
    assert json.loads((last / "files" / "n.json").read_text()) == 1
    again, end = d.run(
        "t",
        {"do": "checkpoint", "n": 1},
        checkpoint=str(last),
        iteration=2,
        time_total_s=1.0,
        next_checkpoint=2,
    )
    assert isinstance(end, Ended)
    assert [(e.iteration, e.metrics["n"], e.checkpoint.name) for e in again] == [(3, 2, "checkpoint_000002")]


def test_threads_report_in_turn(drive: Drives) -> None:
    results, end = drive().run("t", {"do": "report_in_threads"})
    assert isinstance(end, Ended)
    assert [e.iteration for e in results] == list(range(1, 21))
    for thread in range(4):
        assert [e.metrics["step"] for e in results if e.metrics["thread"] == thread] == list(range(5))
    names = [e.checkpoint.name for e in results]
    assert names == [f"checkpoint_{number:06d}" for number in range(20)]


def test_a_directory_that_vanishes_while_it_is_reported_is_named(drive: Drives) -> None:
    _, end = drive().run("t", {"do": "vanishing"})
    assert isinstance(end, Failed)
    assert "gone" in end.error


def test_a_class_saves_at_a_frequency_when_it_wishes_and_when_it_is_asked(drive: Drives) -> None:
    d = drive("Counter")
    results, _ = d.run("often", {"end": 4}, checkpoint_frequency=2)
    assert [e.checkpoint and e.checkpoint.name for e in results] == [
        None,
        "checkpoint_000000",
        None,
        "checkpoint_000001",
    ]
    results, _ = d.run("wish", {"end": 2, "wish": 1})
    assert [bool(e.checkpoint) for e in results] == [True, False]
    job = d.launch("asked")
    d.event(job.run, Reported)
    d.order(job.run, Stop(save=True))
    saved = d.event(job.run, Saved)
    assert (saved.iteration, saved.checkpoint.name) == (1, "checkpoint_000000")
    d.order(job.run, Go())
    assert isinstance(d.last(job.run)[0], Ended)
    results, _ = d.run(
        "asked",
        {"end": 3},
        checkpoint=str(d.root / "asked" / "checkpoint_000000"),
        iteration=1,
        next_checkpoint=1,
    )
    assert [(e.iteration, e.metrics["n"]) for e in results] == [(2, 2), (3, 3)]


def test_a_class_whose_checkpoints_are_dicts_gets_them_back(drive: Drives) -> None:
    d = drive("Dictionary")
    job = d.launch("t")
    d.event(job.run, Reported)
    d.order(job.run, Stop(save=True))
    d.event(job.run, Saved)
    d.order(job.run, Go())
    d.last(job.run)
    again = d.launch("t", checkpoint=str(d.root / "t" / "checkpoint_000000"), iteration=1, next_checkpoint=1)
    assert d.event(again.run, Reported).metrics == {"n": 2}
    d.order(again.run, Stop())
    d.last(again.run)


def test_save_checkpoint_may_not_return_another_directory(drive: Drives) -> None:
    _, end = drive("Counter").run("t", {"saves": "/elsewhere"}, checkpoint_frequency=1)
    assert "'/elsewhere'" in end.error
    assert "expected None" in end.error


def test_an_accelerator_in_a_function_goes_on_to_the_same_bits(drive: Drives) -> None:
    d = drive("with_accelerator")
    whole, end = d.run("whole", {"n": 4})
    assert isinstance(end, Ended), end
    first, _ = d.run("parts", {"n": 2})
    second, end = d.run(
        "parts",
        {"n": 2},
        checkpoint=str(d.root / "parts" / first[1].checkpoint.name),
        iteration=2,
        next_checkpoint=2,
    )
    assert isinstance(end, Ended), end
    assert [e.metrics for e in [*first[:2], *second]] == [e.metrics for e in whole]
    state = Checkpoint(d.root / "parts" / second[2].checkpoint.name).load()
    assert state["n"] == 2
    assert sum(tensor.sum() for tensor in state["model"].values()) == pytest.approx(
        second[2].metrics["weights"]
    )
