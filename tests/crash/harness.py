"""Kill, or fail, at each single operation that some act does to the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.faults import FaultyFiles, Killed, Locks

from keepstep.errors import BackgroundSaveError, NoSpaceError, StoreError

__all__ = ["Scenario", "fail_at_each_operation", "kill_at_each_operation", "leftovers", "operations_of"]


@dataclass(frozen=True)
class Scenario:
    """What is there before, what is done with faulty files, and what must hold afterwards."""

    before: Callable[[Path], None]
    act: Callable[[Path, Any], None]
    check: Callable[[Path], None]


def leftovers(root: Path) -> list[str]:
    """Everything that no finished run leaves behind."""
    found = [p for p in root.rglob("*") if ".tmp-" in p.name or ".replaced" in p.name]
    trash = root / ".keepstep" / "trash"
    return [str(p.relative_to(root)) for p in [*found, *(trash.iterdir() if trash.is_dir() else [])]]


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory; files that are links of each other stay so."""
    copies: dict[int, str] = {}

    def copy(old: str, new: str) -> str:
        inode = Path(old).stat(follow_symlinks=False).st_ino
        if inode in copies and not Path(old).is_symlink():
            Path(new).hardlink_to(copies[inode])
        else:
            shutil.copy2(old, new, follow_symlinks=False)
            copies[inode] = new
        return new

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def operations_of(tmp_path: Path, scenario: Scenario, *, exchange: bool = True) -> list[str]:
    """What the act does to the disk, in order; `tmp_path/template` holds what was there before."""
    template, root = tmp_path / "template", tmp_path / "whole"
    template.mkdir(parents=True)
    scenario.before(template)
    copy_tree(template, root)
    files = FaultyFiles(exchange=exchange)
    scenario.act(root, files)
    return files.log


def kill_at_each_operation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Scenario,
    *,
    power_cut: bool,
    exchange: bool = True,
) -> int:
    """Kill the act at each of its operations in turn; how many there are."""
    operations = operations_of(tmp_path, scenario, exchange=exchange)
    locks = Locks(monkeypatch)
    for at, operation in enumerate(operations):
        root = tmp_path / f"at{at}"
        copy_tree(tmp_path / "template", root)
        files = FaultyFiles(at=at, power_cut=power_cut, exchange=exchange, graveyard=tmp_path / f"graves{at}")
        with pytest.raises(Killed):
            scenario.act(root, files)
        locks.die()
        _check(scenario, root, f"killed at operation {at} of {len(operations)}: {operation}")
        shutil.rmtree(root)
    return len(operations)


def fail_at_each_operation(
    tmp_path: Path, scenario: Scenario, error: OSError, *, exchange: bool = True
) -> int:
    """Let each operation of the act fail in turn; how many there are."""
    operations = operations_of(tmp_path, scenario, exchange=exchange)
    for at, operation in enumerate(operations):
        root = tmp_path / f"at{at}"
        copy_tree(tmp_path / "template", root)
        failure = _failure_of(scenario, root, FaultyFiles(at=at, error=error, exchange=exchange))
        if isinstance(failure, BackgroundSaveError):
            failure = failure.__cause__
        if failure is not None:
            assert isinstance(failure, StoreError)
            assert isinstance(failure, NoSpaceError) == (error.errno == 28)
        _check(scenario, root, f"failed at operation {at} of {len(operations)}: {operation}")
        shutil.rmtree(root)
    return len(operations)


def _check(scenario: Scenario, root: Path, note: str) -> None:
    try:
        scenario.check(root)
    except BaseException as error:
        error.add_note(note)
        raise


def _failure_of(scenario: Scenario, root: Path, files: FaultyFiles) -> BaseException | None:
    try:
        scenario.act(root, files)
    except (BackgroundSaveError, StoreError) as failure:
        return failure
    return None
