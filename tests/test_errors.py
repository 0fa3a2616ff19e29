"""The exception tree: as its docstring draws it, catchable as what Python calls it, fit to travel."""

from __future__ import annotations

import copy
import errno
import pickle
import re

import pytest

from keepstep import errors


def test_the_drawing_is_the_tree() -> None:
    drawn, above = {}, [""]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)(\w+)", line):
            depth = len(found[1]) // 4
            above[depth + 1 :] = [found[2]]
            drawn[found[2]] = above[depth]
    kinds = {
        name: kind.__bases__[0].__name__ if kind is not errors.KeepstepError else ""
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.KeepstepError)
    }
    assert drawn == kinds
    assert sorted(errors.__all__) == sorted(kinds)


def test_everything_is_one_family() -> None:
    assert all(issubclass(getattr(errors, name), errors.KeepstepError) for name in errors.__all__)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.UnsupportedTypeError, TypeError),
        (errors.DirectoryNotOursError, FileExistsError),
        (errors.StoreReadOnlyError, PermissionError),
        (errors.NoSpaceError, OSError),
        (errors.NoThreadError, RuntimeError),
        (errors.CheckpointNotFoundError, FileNotFoundError),
        (errors.UsageError, ValueError),
        (errors.MismatchError, ValueError),
    ],
)
def test_builtin_handlers_catch_them(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


def test_a_full_disk_keeps_its_number() -> None:
    error = errors.NoSpaceError("no space to save x")
    assert error.errno == errno.ENOSPC
    assert str(error) == "no space to save x"


def test_damage_names_place_and_what_was_overwritten() -> None:
    error = errors.DigestError("/a/checkpoint_1", "w differs", overwritten=[f"w{i}" for i in range(25)])
    assert str(error).startswith("/a/checkpoint_1: w differs. Already overwritten")
    assert "w19 and 5 more" in str(error)
    assert "load another checkpoint" in str(error)
    assert str(errors.DigestError("/a", "w differs")) == "/a: w differs"


def test_a_mismatch_lists_one_difference_a_line() -> None:
    error = errors.MismatchError("no fit", missing=["a"], unexpected=["b", "c"], different=["d: 1, 2"])
    assert str(error).splitlines() == [
        "no fit",
        "  missing from the checkpoint: a",
        "  unexpected in the checkpoint: b",
        "  unexpected in the checkpoint: c",
        "  different: d: 1, 2",
    ]


@pytest.mark.parametrize(
    "error",
    [
        errors.DigestError("/a", "bad", overwritten=("x",)),
        errors.SchemaVersionError("/a", "new"),
        errors.NoSpaceError("full"),
        errors.MismatchError("no fit", missing=("a",), different=("b",)),
        errors.StoreReadOnlyError(errno.EROFS, "read-only"),
        errors.DirectoryNotOursError(errno.EEXIST, "not ours"),
        errors.ExperimentExistsError(errno.EEXIST, "there"),
        errors.StateChangedError(["model.w", "model.b"]),
        errors.RankMissingError("late", ranks=[1, 2], waited_s=3.5),
        errors.RankFailedError("gone", rank=1, kind="ValueError"),
        errors.CollectiveMismatchError("differ", calls=["a", "b"]),
        errors.UsageError("bad"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_process_boundaries(error: Exception) -> None:
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert vars(back) == vars(error)
        assert getattr(back, "errno", None) == getattr(error, "errno", None)
