"""Which checkpoints of trials stay."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from keepstep.tune.experiment.keeping import Holding, key_of, over_budget, superfluous
from keepstep.tune.experiment.trial import CheckpointRecord
from keepstep.tune.settings import CheckpointConfig

NAN = float("nan")


def record(number: int, *, trial: str = "a", size: int = 10, **metrics: Any) -> CheckpointRecord:
    return CheckpointRecord(
        trial_id=trial,
        name=f"checkpoint_{number:06d}",
        iteration=number + 1,
        time_total_s=number / 2,
        bytes=size,
        metrics=metrics,
    )


def scored(*scores: Any, trial: str = "a", size: int = 10) -> list[CheckpointRecord]:
    return [record(number, trial=trial, size=size, acc=score) for number, score in enumerate(scores)]


def numbers(records: Any) -> list[int]:
    return [int(r.name.rpartition("_")[2]) for r in records]


def kept(records: list[CheckpointRecord], *, may_go_on: bool, pinned: Any = (), **rules: Any) -> list[int]:
    holding = Holding(records=records, may_go_on=may_go_on)
    dropped = superfluous(holding, CheckpointConfig(**rules), pinned=pinned).drop
    return numbers(r for r in records if r not in dropped)


SCORE = {"checkpoint_score_attribute": "acc"}


@pytest.mark.parametrize(
    ("count", "running", "ended"),
    [(None, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), (1, [4], [1]), (2, [1, 4], [1, 3]), (3, [1, 3, 4], [1, 3, 4])],
)
def test_the_newest_counts_while_a_trial_may_go_on_and_then_the_best_stay(
    count: int | None, running: list[int], ended: list[int]
) -> None:
    records = scored(0.1, 0.9, 0.2, 0.5, 0.3)
    assert kept(records, may_go_on=True, num_to_keep=count, **SCORE) == running
    assert kept(records, may_go_on=False, num_to_keep=count, **SCORE) == ended


def test_without_a_score_the_newest_stay() -> None:
    for may_go_on in (True, False):
        assert kept(scored(3, 2, 1, 0), may_go_on=may_go_on, num_to_keep=2) == [2, 3]


def test_told_after_each_report_there_are_never_more_and_the_best_is_among_them() -> None:
    for scores in itertools.permutations([1.0, 2.0, 3.0, NAN, 2.0]):
        for count in (2, 3):
            left: list[CheckpointRecord] = []
            for new in scored(*scores):
                left.append(new)
                verdict = superfluous(
                    Holding(records=left, may_go_on=True), CheckpointConfig(num_to_keep=count, **SCORE)
                )
                left = [r for r in left if r not in verdict.drop]
                assert len(left) <= count
                assert left[-1] is new
            assert 3.0 in [r.metrics["acc"] for r in left]


def test_min_means_the_smallest_and_equals_go_to_the_newer() -> None:
    order = {"checkpoint_score_order": "min", **SCORE}
    assert kept(scored(2, 1, 1, 5), may_go_on=False, num_to_keep=2, **order) == [1, 2]
    assert kept(scored(2, 1, 1, 5), may_go_on=False, num_to_keep=1, **order) == [2]


@pytest.mark.parametrize("order", ["max", "min"])
def test_nan_is_the_worst_and_infinities_are_numbers(order: Any) -> None:
    records = scored(NAN, float("inf"), float("-inf"), NAN)
    rules = {"checkpoint_score_order": order, **SCORE}
    assert kept(records, may_go_on=False, num_to_keep=2, **rules) == [1, 2]
    assert kept(scored(10**400, 1.0), may_go_on=False, num_to_keep=1, **rules) == [0 if order == "max" else 1]


@pytest.mark.parametrize("name", ["eval/acc", "training_iteration", "time_total_s"])
def test_scores_may_be_nested_or_counted_by_keepstep(name: str) -> None:
    records = [record(n, eval={"acc": n}) for n in (0, 1, 2)]
    rules: Any = {"checkpoint_score_attribute": name, "checkpoint_score_order": "min"}
    assert kept(records, may_go_on=False, num_to_keep=1, **rules) == [0]
    assert not superfluous(
        Holding(records=records, may_go_on=False), CheckpointConfig(num_to_keep=1, **rules)
    ).messages


def test_a_name_with_a_slash_in_it_is_found_as_it_is() -> None:
    records = [record(0, **{"a/b": 2}), record(1, **{"a/b": 1})]
    assert kept(records, may_go_on=False, num_to_keep=1, checkpoint_score_attribute="a/b") == [0]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": 1}, "'acc' is not in the result that came with it \\(which has: loss\\)"),
        ({}, "which has: nothing"),
        ({"acc": "high"}, "'acc' is 'high' there, which is no number"),
    ],
)
def test_a_score_that_was_not_reported_is_said_and_counts_as_the_worst(metrics: Any, said: str) -> None:
    records = [record(0, acc=-5.0), record(1, **metrics), record(2, acc=-7.0), record(3, **metrics)]
    verdict = superfluous(Holding(records=records, may_go_on=True), CheckpointConfig(num_to_keep=2, **SCORE))
    assert numbers(verdict.drop) == [1, 2], "it is never the newer one in silence"
    (message,) = verdict.messages.values()
    with pytest.raises(
        AssertionError, match=f"trial a reported checkpoint_00000.*{said}.*count as the worst"
    ):
        raise AssertionError(message)


def test_one_to_keep_with_a_score_is_said() -> None:
    config = CheckpointConfig(num_to_keep=1, **SCORE)
    running = superfluous(Holding(records=scored(2, 1), may_go_on=True), config)
    assert numbers(running.drop) == [0]
    assert "num_to_keep=2 keeps the newest and the best" in running.messages["one to keep"]
    assert not superfluous(Holding(records=scored(2, 1), may_go_on=False), config).messages


def test_what_is_pinned_stays_beside_the_others() -> None:
    records = scored(5, 1, 2, 3)
    pinned = {key_of(records[1]), ("b", records[2].name)}
    assert kept(records, may_go_on=True, num_to_keep=2, pinned=pinned, **SCORE) == [0, 1, 3]


def test_unchanged_records_say_the_same_again() -> None:
    holding = Holding(records=scored(1, "x", 2, NAN), may_go_on=True)
    config = CheckpointConfig(num_to_keep=2, **SCORE)
    assert superfluous(holding, config) == superfluous(holding, config)


# ------------------------------------------------------------------------------------------ budget


def dropped(holdings: list[Holding], budget: int, pinned: Any = (), **rules: Any) -> list[tuple[str, int]]:
    verdict = over_budget(holdings, budget, CheckpointConfig(**{**SCORE, **rules}), pinned=pinned)
    return [(r.trial_id, numbers([r])[0]) for r in verdict.drop]


def holdings() -> list[Holding]:
    return [
        Holding(records=scored(0.2, 0.4, 0.1, trial="ended"), may_go_on=False),
        Holding(records=scored(0.9, 0.3, 0.5, trial="best"), may_go_on=False),
        Holding(records=scored(0.0, 0.8, 0.7, trial="runs"), may_go_on=True),
    ]


TURN = [
    ("ended", 2), ("ended", 0), ("best", 1), ("best", 2), ("runs", 0), ("runs", 1), ("ended", 1)
]  # fmt: skip
"""The worst of those that ended, but the best of each; then of those that run, but the newest; the rest."""


@pytest.mark.parametrize("budget", range(0, 100, 5))
def test_the_worst_go_first_and_no_more_than_have_to(budget: int) -> None:
    count = min(len(TURN), -(-(90 - budget) // 10))
    assert dropped(holdings(), budget) == TURN[:count]


def test_a_budget_never_takes_what_is_pinned() -> None:
    pinned = {("ended", "checkpoint_000002"), ("runs", "checkpoint_000000")}
    assert dropped(holdings(), 0, pinned) == [key for key in TURN if key not in {("ended", 2), ("runs", 0)}]


def test_a_budget_that_cannot_be_held_is_said() -> None:
    verdict = over_budget(holdings(), 15, CheckpointConfig(**SCORE))
    assert "take 5 bytes more than byte_budget=15" in verdict.messages["budget"]
    assert not over_budget(holdings(), 90, CheckpointConfig(**SCORE)).drop
    assert not over_budget([], 1, CheckpointConfig()).drop


def test_without_a_score_the_newest_of_each_trial_stay_longest() -> None:
    assert dropped(holdings()[:1], 10, checkpoint_score_attribute=None) == [("ended", 0), ("ended", 1)]
