"""`BasicVariantGenerator`: grids times samples, points to try first, and the same again after a restart."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from keepstep.errors import UsageError
from keepstep.tune.search import BasicVariantGenerator, Searcher
from keepstep.tune.search.description import described, revived
from keepstep.tune.search.sample import choice, randint, uniform
from keepstep.tune.search.space import grid_search


def generator(space: dict[str, Any], num_samples: int = 1, **arguments: Any) -> BasicVariantGenerator:
    made = BasicVariantGenerator(**arguments)
    made.set_seed(3)
    made.set_search_properties(None, None, space, num_samples=num_samples)
    return made


def suggestions(searcher: Searcher, most: int = 100) -> list[Any]:
    found: list[Any] = []
    while len(found) < most:
        config = searcher.suggest(f"t{len(found)}")
        if config == Searcher.FINISHED:
            break
        found.append(config)
    return found


def test_the_grid_is_walked_through_for_each_sample() -> None:
    searcher = generator({"a": grid_search([1, 2]), "u": uniform(0, 1), "c": 5}, num_samples=3)
    assert searcher.total_samples == 6
    found = suggestions(searcher)
    assert [config["a"] for config in found] == [1, 2] * 3
    assert len({config["u"] for config in found}) == 6
    assert searcher.evaluated("t1") == {"a": 2, "u": found[1]["u"]}
    assert searcher.suggest("late") == searcher.suggest("later") == Searcher.FINISHED


def test_points_come_first_and_take_the_place_of_samples() -> None:
    """The example of ray.tune's own documentation: four samples, six trials."""
    points = [{"a": 2, "b": 2}, {"a": 1}, {"b": 2}]
    searcher = generator({"a": grid_search([1, 2]), "b": randint(0, 3)}, 4, points_to_evaluate=points)
    assert searcher.total_samples == 6
    found = suggestions(searcher)
    assert found[0] == {"a": 2, "b": 2}
    assert found[1]["a"] == 1
    assert found[2:4] == [{"a": 1, "b": 2}, {"a": 2, "b": 2}]
    assert [config["a"] for config in found[4:]] == [1, 2]
    more = generator({"b": randint(0, 3)}, 1, points_to_evaluate=[{"b": 1}, {"b": 2}])
    assert suggestions(more) == [{"b": 1}, {"b": 2}]
    assert more.total_samples == 2


def test_points_that_do_not_fit_are_told() -> None:
    space = {"net": {"width": randint(1, 5), "act": choice(["relu"])}, "c": 1}
    with pytest.raises(UsageError, match=r"points_to_evaluate\[1\] has 'net/widht'.*'net/width'"):
        generator(space, points_to_evaluate=[{}, {"net": {"widht": 3}}])
    with pytest.raises(UsageError, match="expected a list of dicts"):
        BasicVariantGenerator(points_to_evaluate={"a": 1})  # type: ignore[arg-type]
    searcher = generator(space, points_to_evaluate=[{"net": {"width": 50}, "c": 2}])
    assert [message.split()[2] for message in searcher.messages] == ["net/width=50,", "c=2,"]
    assert suggestions(searcher) == [{"net": {"width": 50, "act": "relu"}, "c": 2}]


def test_no_more_than_max_concurrent_at_a_time() -> None:
    searcher = generator({"a": grid_search([1, 2, 3])}, max_concurrent=1)
    assert searcher.suggest("x") == {"a": 1}
    assert searcher.suggest("y") is None
    searcher.on_trial_complete("x", {"loss": 1})
    assert searcher.suggest("y") == {"a": 2}
    with pytest.raises(UsageError, match="max_concurrent is -1"):
        BasicVariantGenerator(max_concurrent=-1)


def test_seeds_decide_and_a_description_makes_it_anew() -> None:
    space = {"u": uniform(0, 1)}
    assert suggestions(generator(space, 5)) == suggestions(generator(space, 5))
    own = generator(space, 5, random_state=8)
    assert suggestions(own) != suggestions(generator(space, 5))
    from_numpy = generator(space, 5, random_state=np.random.default_rng(8), points_to_evaluate=[{"u": 0.5}])
    anew = revived(json.loads(json.dumps(described(from_numpy))))
    anew.set_search_properties(None, None, space, num_samples=5)
    assert suggestions(anew) == suggestions(from_numpy)
    with pytest.raises(UsageError, match="points_to_evaluate/0/u"):
        revived(described(generator(space, points_to_evaluate=[{"u": object()}])))


def test_the_same_object_begins_anew_with_the_next_experiment() -> None:
    space = {"u": uniform(0, 1)}
    searcher = generator(space, 3, max_concurrent=3)
    first = suggestions(searcher, 3)
    searcher.set_search_properties(None, None, space, num_samples=3)
    assert suggestions(searcher, 3) == first


def test_samples_without_end() -> None:
    searcher = generator({"u": uniform(0, 1)}, -1)
    assert searcher.total_samples is None
    assert len({config["u"] for config in suggestions(searcher, 300)}) == 300


def test_a_suggestion_costs_the_same_whether_it_is_the_first_or_the_ten_thousandth() -> None:
    space = {
        "g": grid_search(range(10**4)),
        "h": grid_search(range(10**4)),
        "u": uniform(0, 1),
        "c": list(range(20)),
    }
    searcher = generator(space)
    spans = []
    for block in range(10):
        begin = time.process_time()
        for at in range(1000):
            searcher.suggest(f"{block}_{at}")
        spans.append(time.process_time() - begin)
    assert min(spans[-3:]) < 3 * min(spans[:3])
    assert sum(spans) < 5
