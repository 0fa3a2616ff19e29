"""Keep or drop is a pure function; whatever the rules, the newest, pinned and tagged ones stay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.checkpoint.format.manifest import FileEntry, Manifest
from keepstep.checkpoint.keeping.catalog import Entry
from keepstep.checkpoint.keeping.retention import Retention, decide
from keepstep.errors import UsageError


def entry(number: int, *, damaged: bool = False, size: int = 100, **said: Any) -> Entry:
    manifest = Manifest(
        id=str(number),
        created_at="2020-01-01T00:00:00+00:00",
        step=said.get("step", number),
        epoch=None,
        metrics=said.get("metrics", {}),
        tags=said.get("tags", ()),
        pinned=said.get("pinned", False),
        parent=None,
        run="r",
        attempt=1,
        environment={},
        files={"state.json": FileEntry(bytes=size, digest="0" * 32)},
    )
    path = Path(f"checkpoint_{number}")
    return Entry(
        path=path, number=number, manifest=None if damaged else manifest, problem="x" if damaged else None
    )


def kept(entries: list[Entry], **rules: Any) -> list[int]:
    return [d.entry.number for d in decide(entries, Retention(**rules)) if d.keep]


def test_rules_add_up() -> None:
    entries = [entry(n, metrics={"loss": abs(n - 4)}) for n in range(10)]
    assert kept(entries) == list(range(10))
    assert kept(entries, keep_last=3) == [7, 8, 9]
    assert kept(entries, keep_every_n_steps=4) == [0, 4, 8, 9]
    assert kept(entries, keep_best=("loss", "min", 3)) == [3, 4, 5, 9]
    assert kept(entries, keep_best=("loss", "max", 1), keep_last=1, keep_every_n_steps=5) == [0, 5, 9]


def test_nan_is_never_the_best() -> None:
    entries = [
        entry(n, metrics={"loss": loss})
        for n, loss in enumerate([math.nan, 2.0, math.inf, math.nan, -math.inf, 0.0])
    ]
    assert kept(entries, keep_best=("loss", "min", 1)) == [4, 5]
    assert kept(entries, keep_best=("loss", "max", 1)) == [2, 5]
    assert kept(entries, keep_best=("other", "max", 1)) == [5]


def test_a_damaged_one_neither_counts_nor_goes() -> None:
    entries = [entry(0), entry(1), entry(2, damaged=True)]
    assert kept(entries, keep_last=1) == [1, 2]


def test_the_budget_drops_the_oldest_that_nobody_protects() -> None:
    entries = [entry(0, pinned=True), entry(1), entry(2, tags=("x",)), entry(3), entry(4)]
    assert kept(entries, byte_budget=400) == [0, 2, 3, 4]
    assert kept(entries, byte_budget=1) == [0, 2, 4]
    assert kept(entries, byte_budget=350, keep_last=3) == [0, 2, 4]


def test_every_decision_has_a_reason() -> None:
    entries = [entry(0, pinned=True), entry(1, tags=("best",)), entry(2), entry(3, damaged=True), entry(4)]
    reasons = {d.entry.number: d.reason for d in decide(entries, Retention(keep_last=1))}
    assert reasons == {
        0: "pinned",
        1: "tagged best",
        2: "no rule keeps it",
        3: "damaged; delete it yourself",
        4: "the newest",
    }


rules = st.fixed_dictionaries(
    {},
    optional={
        "keep_last": st.none() | st.integers(1, 4),
        "keep_every_n_steps": st.none() | st.integers(1, 4),
        "byte_budget": st.none() | st.integers(1, 900),
        "keep_best": st.none()
        | st.tuples(st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
    },
)
histories = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "pinned": st.booleans(),
            "tags": st.sampled_from([(), ("a",)]),
            "damaged": st.booleans(),
            "size": st.integers(0, 300),
            "step": st.none() | st.integers(0, 20),
            "metrics": st.dictionaries(
                st.just("loss"), st.floats() | st.text() | st.booleans() | st.integers()
            ),
        },
    ),
    max_size=8,
)


@given(histories, rules)
def test_whatever_the_rules_nothing_protected_goes(
    history: list[dict[str, Any]], given_rules: dict[str, Any]
) -> None:
    entries = [entry(number, **said) for number, said in enumerate(history)]
    retention = Retention(**given_rules)
    decisions = decide(entries, retention)
    assert [d.entry for d in decisions] == entries
    readable = [e for e in entries if e.manifest is not None]
    for decision in decisions:
        manifest = decision.entry.manifest
        if (
            manifest is None
            or manifest.pinned
            or manifest.tags
            or decision.entry is readable[-1]
            or retention.keeps_all
        ):
            assert decision.keep
        assert decision.reason


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep_last": 0}, "keep_last is 0; expected a whole number of at least 1, or None for no limit"),
        ({"keep_last": True}, "keep_last is True"),
        ({"keep_every_n_steps": -1}, "keep_every_n_steps is -1"),
        ({"byte_budget": 1.5}, "byte_budget is 1.5"),
        ({"keep_best": "loss"}, "keep_best is 'loss'; expected"),
        ({"keep_best": ("loss", "lowest", 1)}, "keep_best is"),
        ({"keep_best": ("loss", "min", 0)}, "keep_best is"),
        ({"keep_best": (1, "min", 1)}, "keep_best is"),
    ],
)
def test_impossible_rules_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Retention(**wrong)
