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
        created_at=said.get("created_at", "2020-01-01T00:00:00+00:00"),
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


def test_of_equals_the_newest_is_the_best() -> None:
    entries = [entry(n, metrics={"loss": loss}) for n, loss in enumerate([1.0, 0.5, 0.5, 1.0, 2.0])]
    assert kept(entries, keep_best=("loss", "min", 1)) == [2, 4]
    assert kept(entries, keep_best=("loss", "max", 2)) == [3, 4]


def at(*times: str) -> list[Entry]:
    return [entry(n, created_at=f"{time}+00:00") for n, time in enumerate(times)]


def test_age_counts_back_from_the_newest() -> None:
    entries = at("2026-01-01T10:00:00", "2026-01-01T10:30:00", "2026-01-01T11:00:00", "2026-01-01T11:20:00")
    assert kept(entries, keep_within_s=3600) == [1, 2, 3]
    assert kept(entries, keep_within_s=1800) == [2, 3]
    assert kept(entries, keep_within_s=1) == [2, 3], "the one before the newest stays"
    assert kept(entries, keep_within_s=1, keep_every_n_steps=3) == [0, 2, 3]
    assert kept([*entries[:1], entry(1, pinned=True), *entries[2:]], keep_within_s=1) == [1, 2, 3]


def test_a_clock_that_jumps_does_not_empty_a_store() -> None:
    back = at("2050-01-01T00:00:00", "2050-01-01T01:00:00", "2026-01-01T00:00:00", "2026-01-01T00:10:00")
    assert kept(back, keep_within_s=3600) == [0, 1, 2, 3], "from the future: as old as the one that followed"
    assert kept(back, keep_within_s=300) == [2, 3]
    forth = at("1970-01-01T00:00:00", "1970-01-01T00:10:00", "2026-01-01T00:00:00")
    assert kept(forth, keep_within_s=3600) == [1, 2], "a fallback is left"
    between = at("2026-01-01T00:00:00", "1970-01-01T00:00:00", "2026-01-01T00:20:00", "2026-01-01T00:30:00")
    assert kept(between, keep_within_s=3600) == [0, 2, 3]


def test_a_time_that_says_nothing_is_that_of_the_next_one() -> None:
    entries = at("2026-01-01T00:00:00", "2026-01-01T02:00:00", "2026-01-01T02:10:00", "2026-01-01T02:20:00")
    odd = [entry(1, created_at="yesterday"), entry(3, created_at="")]
    assert kept([entries[0], odd[0], entries[2], odd[1]], keep_within_s=900) == [1, 2, 3]
    assert kept([entry(n, created_at="?") for n in range(3)], keep_within_s=1) == [0, 1, 2]


def test_the_budget_counts_a_shared_file_once_and_frees_it_with_its_last_holder() -> None:
    entries = [entry(n) for n in range(4)]
    held = {n: {"base": 1000, f"adapter {n}": 10} for n in range(4)}

    def freed(budget: int) -> dict[int, int]:
        decisions = decide(entries, Retention(byte_budget=budget), held)
        return {d.entry.number: d.frees_bytes for d in decisions if not d.keep}

    assert freed(1040) == {}
    assert freed(1039) == {0: 10}
    assert freed(1015) == {0: 10, 1: 10, 2: 10}
    held[3] = {"other base": 1000, "adapter 3": 10}
    assert freed(2030) == {0: 10}
    assert freed(1100) == {0: 10, 1: 10, 2: 1010}
    last = decide(entries, Retention(keep_last=1), held)
    assert [d.frees_bytes for d in last] == [10, 10, 1010, 0], "the base goes with the last that names it"


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
        "keep_within_s": st.none() | st.floats(1, 1e9),
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
            "created_at": st.datetimes().map(lambda time: time.isoformat() + "+00:00") | st.text(),
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
        ({"keep_within_s": 0}, "keep_within_s is 0; expected more than 0 seconds"),
        ({"keep_within_s": math.nan}, "keep_within_s is nan"),
        ({"keep_within_s": True}, "keep_within_s is True"),
        ({"keep_best": "loss"}, "keep_best is 'loss'; expected"),
        ({"keep_best": ("loss", "lowest", 1)}, "keep_best is"),
        ({"keep_best": ("loss", "min", 0)}, "keep_best is"),
        ({"keep_best": (1, "min", 1)}, "keep_best is"),
    ],
)
def test_impossible_rules_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Retention(**wrong)
