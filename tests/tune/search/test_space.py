"""Search spaces: bounds, order and dependencies are those of `ray.tune` 2.60, read there."""

from __future__ import annotations

import enum
import json
import math
import random
import statistics
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.errors import UsageError
from keepstep.tune.search.description import described, differences, revived, undescribed
from keepstep.tune.search.domain import Categorical, Domain, Float, Function, Integer
from keepstep.tune.search.sample import (
    choice,
    lograndint,
    loguniform,
    qlograndint,
    qloguniform,
    qrandint,
    qrandn,
    quniform,
    randint,
    randn,
    sample_from,
    uniform,
)
from keepstep.tune.search.space import completed, copied, grid_search, variables, with_value
from keepstep.tune.search.tag import experiment_tag
from keepstep.tune.search.variants import Variant, count, sampling, variants


def drawn(domain: Domain, times: int = 2000, seed: int = 0) -> list[Any]:
    return list(domain.sample(size=times, random_state=seed))


def all_of(space: Any, seed: int = 0, *, constant: bool = False) -> list[Variant]:
    return list(variants(space, sampling(random.Random(seed)), constant_grid_search=constant))


class TestBounds:
    def test_the_upper_bound_of_whole_numbers_is_left_out(self) -> None:
        assert set(drawn(randint(3, 6))) == {3, 4, 5}
        assert set(drawn(lograndint(1, 5))) == {1, 2, 3, 4}

    def test_quantised_whole_numbers_reach_the_upper_bound_except_by_ones(self) -> None:
        assert set(drawn(qrandint(3, 12, 3))) == {3, 6, 9, 12}
        assert set(drawn(qrandint(1, 11, 5))) == {5, 10}
        assert set(drawn(qrandint(3, 6))) == {3, 4, 5}
        assert set(drawn(qrandint(5, 5, 5))) == {5}
        assert set(drawn(qlograndint(1, 20, 5))) == {5, 10, 15, 20}
        assert set(drawn(qlograndint(1, 4, 1))) == {1, 2, 3}

    def test_quantised_numbers_reach_both_bounds(self) -> None:
        values = drawn(quniform(0, 1, 0.25))
        assert set(values) == {0.0, 0.25, 0.5, 0.75, 1.0}
        often = Counter(values)
        assert often[0.0] < 0.7 * often[0.5]  # half as wide at the ends
        assert set(drawn(qloguniform(1e-4, 1e-3, 1e-4))) <= {k * 1e-4 for k in range(1, 11)}

    def test_distributions_look_like_their_names(self) -> None:
        assert statistics.fmean(drawn(uniform(2, 4))) == pytest.approx(3, abs=0.05)
        logs = [math.log10(value) for value in drawn(loguniform(1e-4, 1e-2))]
        assert statistics.fmean(logs) == pytest.approx(-3, abs=0.05)
        assert statistics.pstdev(logs) == pytest.approx(2 / math.sqrt(12), rel=0.05)
        normal = drawn(randn(10, 2))
        assert statistics.fmean(normal) == pytest.approx(10, abs=0.15)
        assert statistics.pstdev(normal) == pytest.approx(2, rel=0.05)
        assert all(value % 0.5 == 0 for value in drawn(qrandn(0, 1, 0.5)))
        ones = Counter(drawn(lograndint(1, 1000)))
        assert ones[1] / 2000 == pytest.approx(math.log(2) / math.log(1000), abs=0.03)
        assert Counter(drawn(choice(["a", "b"])))["a"] == pytest.approx(1000, abs=120)

    def test_values_are_plain_numbers_and_choices_the_objects_themselves(self) -> None:
        assert type(uniform(0, 1).sample()) is float
        assert type(randint(np.int64(0), np.float64(2)).sample()) is int
        assert choice({"adam": 1}.keys()).sample() == "adam"
        thing = object()
        assert choice([thing]).sample() is thing
        assert type(loguniform(np.float32(1), 2).sample()) is float

    @given(st.integers(-50, 50), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**32))
    @settings(max_examples=60, deadline=None)
    def test_every_quantised_draw_is_a_multiple_within_the_bounds(
        self, lower: int, width: int, q: int, seed: int
    ) -> None:
        try:
            domain = qrandint(lower, lower + width, q)
        except UsageError:
            assert all(value % q for value in range(lower, lower + width + 1))
            return
        for value in drawn(domain, 20, seed):
            assert value % q == 0
            assert lower <= value <= lower + width
            assert domain.is_valid(value)

    @given(st.floats(1e-12, 1e12), st.floats(1, 1e6), st.integers(0, 2**32))
    @settings(max_examples=60, deadline=None)
    def test_logarithmic_draws_stay_within_their_bounds(self, lower: float, times: float, seed: int) -> None:
        domain = loguniform(lower, lower * times)
        assert all(domain.is_valid(value) for value in drawn(domain, 20, seed))

    def test_the_same_seed_draws_the_same(self) -> None:
        assert drawn(loguniform(1, 9, base=2), 9, 7) == drawn(loguniform(1, 9), 9, 7)
        for domain in (uniform(0, 1), randn(), loguniform(1, 9), randint(0, 10**30), choice(range(99))):
            assert drawn(domain, 50, 7) == drawn(domain, 50, 7) != drawn(domain, 50, 8)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: uniform(2, 1), "lower must not be above upper"),
            (lambda: uniform(None, 1), "give both bounds"),
            (lambda: uniform("0", 1), "expected a number"),
            (lambda: uniform(math.nan, 1), "expected a number"),
            (lambda: loguniform(-4, -1), "1e-4, not -4"),
            (lambda: lograndint(0, 5), "bounds > 0"),
            (lambda: loguniform(1, 2, base=1), "the base of a logarithm"),
            (lambda: randint(3, 3), "upper must be above lower"),
            (lambda: randint(0.5, 3), "whole number"),
            (lambda: quniform(0, 1, 0.3), "no multiple of q=0.3"),
            (lambda: quniform(0, 1, 0), "> 0"),
            (lambda: qrandint(6, 9, 5), "no multiple of q=5"),
            (lambda: randn(0, 0), "sd is 0"),
            (lambda: choice([]), "at least one value"),
            (lambda: choice({1, 2}), r"sorted\(...\)"),
            (lambda: choice("adam"), "expected a list"),
            (lambda: choice({"adam": 1}), "expected a list"),
            (lambda: grid_search([]), "at least one value"),
            (lambda: sample_from(lambda a, b: 1), "one argument, or none"),
            (lambda: sample_from(3), "takes a function"),
            (lambda: Float(0, 1).normal(), "no bounds"),
            (lambda: Float(0, None).sample(), "give both bounds"),
        ],
    )
    def test_arguments_that_cannot_work_are_refused(self, make: Any, says: str) -> None:
        with pytest.raises(UsageError, match=says):
            make()


class TestVariants:
    def test_grids_come_in_the_order_of_their_paths_the_first_fastest(self) -> None:
        space = {"b": grid_search([1, 2]), "a": {"y": {"grid_search": "no"}, "x": grid_search([7, 8])}}
        space["a"] = {"x": grid_search([7, 8])}
        found = [variant.config for variant in all_of(space)]
        assert found == [{"b": b, "a": {"x": x}} for b in (1, 2) for x in (7, 8)]
        assert list(found[0]) == ["b", "a"]

    def test_nested_grids_lists_and_tuples_as_ray_orders_them(self) -> None:
        space = {
            "g": grid_search([1, grid_search([5, 6])]),
            "h": grid_search(["x", "y"]),
            "l": [grid_search([1, 2]), (uniform(0, 1), "c")],
        }
        found = [variant.config for variant in all_of(space)]
        order = [(config["g"], config["h"], config["l"][0]) for config in found]
        assert order == [(g, h, at) for at in (1, 2) for h in "xy" for g in (1, 5, 6)]
        assert (
            len({config["l"][1][0] for config in found}) == 12 - 4
        )  # drawn anew, but kept within g's own grid
        assert all(config["l"][1][1] == "c" for config in found)
        assert count(space) == 12

    def test_constant_grid_search_keeps_what_was_drawn(self) -> None:
        space = {
            "g": grid_search([1, 2, 3]),
            "u": uniform(0, 1),
            "f": sample_from(lambda spec: spec.config.g * 2),
        }
        free, kept = all_of(space), all_of(space, constant=True)
        assert len({variant.config["u"] for variant in free}) == 3
        assert len({variant.config["u"] for variant in kept}) == 1
        assert [variant.config["f"] for variant in kept] == [2, 4, 6]

    @pytest.mark.parametrize(
        "read",
        [
            lambda spec: spec.config.net.width * 2,
            lambda spec: spec["config"]["net"]["width"] * 2,
            lambda config: config["net"]["width"] * 2,
            lambda config: config.net.get("width") * 2,
        ],
    )
    def test_functions_read_what_others_drew_wherever_they_stand(self, read: Any) -> None:
        space = {
            "late": sample_from(lambda c: c.twice + 1),
            "twice": sample_from(read),
            "net": {"width": randint(3, 9)},
        }
        (variant,) = all_of(space)
        width = variant.config["net"]["width"]
        assert variant.config["twice"] == 2 * width
        assert variant.config["late"] == 2 * width + 1
        assert variant.evaluated == {"late": 2 * width + 1, "twice": 2 * width, "net/width": width}

    def test_a_chosen_dict_draws_its_own_variables_and_others_may_read_them(self) -> None:
        space = {
            "opt": choice([{"name": "sgd", "momentum": uniform(0, 1)}]),
            "half": sample_from(lambda c: c.opt.momentum / 2),
        }
        (variant,) = all_of(space)
        momentum = variant.config["opt"]["momentum"]
        assert variant.config["half"] == momentum / 2
        assert variant.evaluated == {"opt/name": "sgd", "opt/momentum": momentum, "half": momentum / 2}

    def test_functions_that_wait_for_each_other_are_named(self) -> None:
        with pytest.raises(UsageError, match="'a', 'b'"):
            all_of({"a": sample_from(lambda c: c.b), "b": sample_from(lambda c: c.a), "c": 1})

    def test_an_error_in_a_function_names_the_key(self) -> None:
        with pytest.raises(UsageError, match=r"'x/y' raised AttributeError.*'lrr'.*configuration has: x, lr"):
            all_of({"x": {"y": sample_from(lambda spec: spec.config.lrr)}, "lr": 1})

    def test_what_functions_draw_from_global_generators_comes_from_the_seed(self) -> None:
        space = {
            "a": sample_from(random.random),
            "b": sample_from(lambda spec: np.random.uniform()),  # noqa: NPY002,
        }
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        before = random.getstate()
        first, again, other = (all_of(space, seed)[0].config for seed in (3, 3, 4))
        assert first == again != other
        assert random.getstate() == before

    def test_plain_functions_are_constants_and_text_is_not_run(self) -> None:
        function = all_of({"f": max})[0].config["f"]
        assert function is max
        with pytest.raises(UsageError, match="sample_from"):
            all_of({"a": {"eval": "spec.config.b"}})

    def test_variants_share_no_containers(self) -> None:
        space = {"l": [1, {"k": 2}], "g": grid_search([1, 2]), "d": OrderedDict(a=1)}
        first, second = all_of(space)
        first.config["l"][1]["k"] = 99
        assert second.config["l"][1]["k"] == 2 == space["l"][1]["k"]
        assert type(first.config["d"]) is OrderedDict

    def test_a_space_is_counted_without_walking_through_it(self) -> None:
        assert (
            count({"a": grid_search(range(1000)), "b": grid_search(range(1000)), "c": uniform(0, 1)}) == 10**6
        )
        assert count({"a": choice([1, grid_search([1, 2])])}) is None
        assert count({"a": choice([grid_search([3, 4]), grid_search([1, 2])])}) == 2

    @given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans())
    @settings(max_examples=30, deadline=None)
    def test_every_combination_comes_once(self, sizes: list[int], constant: bool) -> None:
        space = {f"g{at}": grid_search(range(size)) for at, size in enumerate(sizes)} | {"u": uniform(0, 1)}
        found = [
            tuple(v.config[f"g{at}"] for at in range(len(sizes))) for v in all_of(space, constant=constant)
        ]
        assert len(found) == len(set(found)) == math.prod(sizes) == count(space)


class TestTags:
    def test_a_tag_says_what_was_drawn(self) -> None:
        assert experiment_tag(0, {"lr": 0.1, "net/width": 3}) == "0_lr=0.1000,width=3"
        assert experiment_tag(7, {}) == "7"
        assert experiment_tag(1, {"a/lr": 1e-5, "b/lr": 2e9}) == "1_a_lr=1e-05,b_lr=2e09"
        assert experiment_tag(2, {"layers/0": 16}) == "2_layers_0=16"

    @given(st.dictionaries(st.text(max_size=20), st.one_of(st.text(), st.floats(), st.none(), st.integers())))
    @settings(max_examples=80, deadline=None)
    def test_a_tag_is_safe_as_the_name_of_a_directory(self, evaluated: dict[str, Any]) -> None:
        tag = experiment_tag(12, evaluated)
        assert len(tag) <= 100
        assert tag.startswith("12")
        assert not set(tag) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=,.")


class Color(enum.IntEnum):
    RED = 1


SPACE = {
    "lr": loguniform(1e-4, 1e-1),
    "q": quniform(0, 1, 0.25),
    "n": randn(1, 2),
    "i": qrandint(2, 8, 2),
    "j": lograndint(1, 9),
    "c": choice(["a", {"x": uniform(0, 1)}]),
    "g": grid_search([1, 2]),
    "t": (1, [2.5, None, True]),
    3: math.inf,
}


class TestDescriptions:
    def test_a_space_goes_to_json_and_back(self) -> None:
        said = json.loads(json.dumps(described(SPACE), allow_nan=False))
        assert revived(said) == SPACE
        assert [v.config for v in all_of(revived(said), 3)] == [v.config for v in all_of(SPACE, 3)]

    def test_what_json_cannot_hold_is_named(self) -> None:
        space = {
            "f": sample_from(lambda c: 1),
            "opt": {"schedule": [max]},
            "o": object(),
            "n": np.float64(0.5),
        }
        said = json.loads(json.dumps(described(space)))
        assert said["n"] == 0.5
        assert [place for place, _ in undescribed(said)] == ["f", "opt/schedule/0", "o"]
        with pytest.raises(
            UsageError, match=r"'opt/schedule/0' \(builtins.max\).*hand over param_space again"
        ):
            revived(said)

    def test_what_comes_back_is_of_the_same_type_or_has_to_be_handed_over(self) -> None:
        kept = {"path": Path("a/b"), "one": np.int64(3), "half": np.float32(0.5), "on": np.bool_(True)}
        back = revived(json.loads(json.dumps(described(kept))))
        assert back == {"path": Path("a/b"), "one": 3, "half": 0.5, "on": True}
        assert [type(value) for value in back.values()][1:] == [int, float, bool]
        lost = {"array": np.zeros(3), "d": OrderedDict(a=1), "f": np.sin, "b": b"x", "s": {1}, "e": Color.RED}
        assert [place for place, _ in undescribed(json.loads(json.dumps(described(lost))))] == list(lost)

    def test_differences_say_what_and_where(self) -> None:
        assert differences(described(SPACE), described(SPACE)) == []
        old = described({"lr": uniform(0, 1), "net": {"width": 3}, "gone": 1, "f": max})
        new = described({"lr": uniform(0, 2), "net": {"width": 4}, "new": [1], "f": min})
        assert differences(old, new) == [
            "lr: was uniform float lower=0.0, upper=1.0 and is uniform float lower=0.0, upper=2.0",
            "net/width: was 3 and is 4",
            "gone: was 1 and is gone",
            "f: was builtins.max and is builtins.min",
            "new: is new ([1])",
        ]
        assert differences({"a": 1}, {"a": True}) == ["a: was 1 and is True"]

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
                | st.tuples(inner)
            ),
            max_leaves=8,
        )
    )
    @settings(max_examples=60, deadline=None)
    def test_whatever_is_nested_comes_back(self, value: Any) -> None:
        said = json.loads(json.dumps(described(value), allow_nan=False))
        assert revived(said) == value
        assert differences(described(value), said) == []


class TestSpaces:
    def test_a_suggestion_is_completed_by_what_is_fixed(self) -> None:
        space = {"lr": uniform(0, 1), "net": {"width": 3, "depth": 2}, "g": grid_search([1, 2])}
        config = completed(space, {"lr": 0.5, "net": {"width": 9}, "g": {"own": 1}, "more": 1}, by="Mine")
        assert config == {"lr": 0.5, "net": {"width": 9, "depth": 2}, "g": {"own": 1}, "more": 1}
        with pytest.raises(UsageError, match=r"'lr'.*Mine"):
            completed(space, {"g": 1}, by="Mine")

    def test_a_value_is_put_in_without_touching_the_rest(self) -> None:
        space = {"a": ({"b": [1, 2]},), "c": {}}
        changed = with_value(space, ("a", 0, "b", 1), 5)
        assert changed == {"a": ({"b": [1, 5]},), "c": {}}
        assert space == {"a": ({"b": [1, 2]},), "c": {}}
        assert changed["c"] is space["c"]
        assert copied(space)["c"] is not space["c"]

    def test_domains_are_values(self) -> None:
        assert uniform(0, 1) == Float(0, 1)
        assert randint(0, 3) == Integer(0, 3) != Integer(0, 4)
        assert hash(choice([1, [2]])) == hash(Categorical([1, [2]]))
        assert [path for path, _ in variables({"a": [uniform(0, 1)], "b": Function(max)})] == [
            ("a", 0),
            ("b",),
        ]
