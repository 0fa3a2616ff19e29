"""Every executor, by one fixture: the contract suite runs against all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.tune.executors import heavy, trials
from tests.tune.executors.driving import Drive

from keepstep.tune.executors.inline import InlineExecutor
from keepstep.tune.executors.local import LocalExecutor
from keepstep.tune.executors.protocol import Executor, Resources


@dataclass(frozen=True)
class Kind:
    """An executor under test, and what it does not promise.

    Attributes:
        make: of a trainable and what there is in all.
        processes: each trial has a process of its own.
        captures: what a trial prints goes to the files that the job names.
    """

    make: Callable[[Any, Resources], Executor]
    processes: bool
    captures: bool


KINDS = {
    "inline": Kind(lambda trainable, total: InlineExecutor(trainable, total=total), False, False),
    "local": Kind(lambda trainable, total: LocalExecutor(trainable, total=total), True, True),
}
TOTAL = {"cpu": 4.0, "gpu": 2.0, "licence": 1.0}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[Any, Executor]]:
    """Executors that tests of a module have in common."""
    made: dict[Any, Executor] = {}
    yield made
    for executor in made.values():
        executor.close()


@pytest.fixture
def drive(kind: Kind, shared: dict[Any, Executor], tmp_path: Path) -> Callable[..., Drive]:
    """An executor of that kind for a trainable of `trials` or `heavy`."""

    def of(name: str = "function") -> Drive:
        key = (id(kind), name)
        if key not in shared:
            shared[key] = kind.make(getattr(heavy if hasattr(heavy, name) else trials, name), TOTAL)
        return Drive(shared[key], tmp_path)

    return of
