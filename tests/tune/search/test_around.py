"""`ConcurrencyLimiter`, `Repeater`, searchers by name, and what the package says of those it has not."""

from __future__ import annotations

import json
from typing import Any

import pytest

import keepstep.tune.search
from keepstep.errors import UsageError
from keepstep.tune.search import (
    BasicVariantGenerator,
    ConcurrencyLimiter,
    Repeater,
    Searcher,
    create_searcher,
)
from keepstep.tune.search.description import described, differences, revived
from keepstep.tune.search.optuna import OptunaSearch
from keepstep.tune.search.repeater import TRIAL_INDEX
from keepstep.tune.search.sample import uniform
from keepstep.tune.search.space import grid_search


class Counting(Searcher):
    """Suggests 0, 1, 2, ... and writes down what it is told."""

    def __init__(self, most: int = 100) -> None:
        super().__init__("loss", "min")
        self.most = most
        self.asked = 0
        self.told: list[Any] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.asked == self.most:
            return self.FINISHED
        self.asked += 1
        return {"x": self.asked - 1}

    def evaluated(self, trial_id: str) -> dict[str, Any]:
        return {"of": trial_id}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.told.append((trial_id, "result"))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.told.append((trial_id, result, error))


def test_the_limiter_waits_for_trials_to_end() -> None:
    inner = Counting(3)
    limiter = ConcurrencyLimiter(inner, max_concurrent=2)
    assert [limiter.suggest(name) for name in "abc"] == [{"x": 0}, {"x": 1}, None]
    assert inner.asked == 2
    limiter.on_trial_result("a", {})
    limiter.on_trial_complete("zzz", {"loss": 1})
    limiter.on_trial_complete("b", {"loss": 1})
    assert inner.told == [("a", "result"), ("b", {"loss": 1}, False)]
    assert limiter.suggest("c") == {"x": 2}
    assert limiter.evaluated("c") == {"of": "c"}
    limiter.on_trial_complete("a", None, error=True)
    assert inner.told[-1] == ("a", None, True)
    assert limiter.suggest("d") == limiter.suggest("d") == Searcher.FINISHED


def test_a_batch_is_told_when_all_of_it_has_ended() -> None:
    inner = Counting()
    limiter = ConcurrencyLimiter(inner, 2, batch=True)
    limiter.suggest("a")
    limiter.suggest("b")
    limiter.on_trial_complete("b", {"loss": 2})
    assert inner.told == []
    assert limiter.suggest("c") is None
    limiter.on_trial_complete("a", {"loss": 1})
    assert inner.told == [("a", {"loss": 1}, False), ("b", {"loss": 2}, False)]
    assert limiter.suggest("c") == {"x": 2}


def test_a_repeater_tells_the_mean() -> None:
    inner = Counting(2)
    repeater = Repeater(inner, repeat=3)
    configs = [repeater.suggest(name) for name in "abcde"]
    assert configs == [{"x": x, TRIAL_INDEX: i} for x, i in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    assert repeater.evaluated("b") == {"of": "a", TRIAL_INDEX: 1}
    repeater.on_trial_complete("b", {"loss": 1.0})
    repeater.on_trial_complete("a", {"loss": float("nan")})
    assert inner.told == []
    repeater.on_trial_complete("c", {"loss": 4.0})
    assert inner.told == [("a", {"loss": 2.5}, False)]
    repeater.suggest("f")
    for name in "def":
        repeater.on_trial_complete(name, None, error=True)
    assert inner.told[-1] == ("d", None, True)
    assert repeater.suggest("g") == Searcher.FINISHED


def test_a_repeater_divides_samples_and_says_so_if_they_do_not_divide() -> None:
    repeater = Repeater(BasicVariantGenerator(), repeat=4, set_index=False)
    repeater.set_search_properties(None, None, {"u": uniform(0, 1)}, num_samples=10)
    assert repeater.total_samples == 12
    assert "no multiple of Repeater's repeat=4" in repeater.messages[0]
    assert repeater.suggest("a") == repeater.suggest("b")
    assert repeater.counts_samples


def test_one_around_the_other_goes_to_json_and_back() -> None:
    """The searcher inside is described with them."""
    made = ConcurrencyLimiter(
        Repeater(OptunaSearch(metric="loss", mode="min", sampler="qmc"), 2), 4, batch=True
    )
    said = json.loads(json.dumps(described(made)))
    anew = revived(said, argument="search_alg")
    suggestions = []
    for one in (made, anew):
        one.set_seed(4)
        one.set_search_properties(None, None, {"u": uniform(0, 1)}, num_samples=-1)
        suggestions.append([one.suggest(str(at)) for at in range(6)])
    assert suggestions[0] == suggestions[1]
    assert suggestions[0][4:] == [None, None]
    other = described(ConcurrencyLimiter(Repeater(OptunaSearch(metric="loss", mode="min"), 2), 5, batch=True))
    assert differences(said, other) == [
        "searcher/searcher/sampler: was 'qmc' and is None",
        "max_concurrent: was 4 and is 5",
    ]
    with pytest.raises(UsageError, match="search_alg again"):
        revived(described(ConcurrencyLimiter(Counting(), 2)), argument="search_alg")
    with pytest.raises(UsageError, match="does not have"):
        revived({"$": "part", "class": "os.system", "arguments": {}})


def test_searchers_by_name() -> None:
    assert isinstance(create_searcher("random", metric="loss", mode="min"), BasicVariantGenerator)
    made = create_searcher("Optuna", metric="loss", mode="min", seed=3)
    assert isinstance(made, OptunaSearch)
    with pytest.raises(UsageError, match=r"no HyperOptSearch.*OptunaSearch"):
        create_searcher("hyperopt")
    with pytest.raises(UsageError, match="allowed: variant_generator, random, optuna"):
        create_searcher("magic")
    with pytest.raises(UsageError, match="no argument 'sead'"):
        create_searcher("optuna", sead=3)
    with pytest.raises(UsageError, match="keepstep has no TuneBOHB"):
        keepstep.tune.search.TuneBOHB  # noqa: B018
    with pytest.raises(AttributeError, match="BasicVariantGenerator"):
        keepstep.tune.search.Magic  # noqa: B018


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConcurrencyLimiter("optuna", 2),  # type: ignore[arg-type]
        lambda: ConcurrencyLimiter(Counting(), 0),
        lambda: Repeater(3),  # type: ignore[arg-type]
        lambda: Repeater(Counting(), True),
    ],
)
def test_arguments_that_cannot_work_are_refused(make: Any) -> None:
    with pytest.raises(UsageError, match=r"takes a Searcher|at least 1"):
        make()


def test_grids_work_within_a_limiter() -> None:
    limiter = ConcurrencyLimiter(BasicVariantGenerator(), 8)
    limiter.set_search_properties(None, None, {"g": grid_search([1, 2])}, num_samples=2)
    assert limiter.counts_samples
    assert limiter.total_samples == 4
    assert [limiter.suggest(str(at)) for at in range(5)][-1] == Searcher.FINISHED
