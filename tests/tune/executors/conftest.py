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
    """

    make: Callable[[Any, Resources], Executor]
    processes: bool


def _on_ray(trainable: Any, total: Resources) -> Executor:
    from keepstep.tune.executors.ray import RayExecutor  # where no test asks for it, Ray isn't loaded

    return RayExecutor(trainable, total=total)


KINDS = {
    "inline": Kind(lambda trainable, total: InlineExecutor(trainable, total=total), False),
    "local": Kind(lambda trainable, total: LocalExecutor(trainable, total=total), True),
    "ray": Kind(_on_ray, True),
}
ALIKE_ON_RAY = (
    "test_what_a_function_returns_is_its_last_result",
    "test_a_function_that_returns_nonsense",
    "test_a_class_that_raises",
    "test_whatever_a_trial_raises",
    "test_a_class_whose_checkpoints_are_dicts",
    "test_a_directory_that_vanishes",
    "test_save_checkpoint_may_not_return",
    "test_a_generator_reports",
    "test_a_class_saves_at_a_frequency",
    "test_threads_report_in_turn",
    "test_an_accelerator_in_a_function",
)
"""What does not pass through an executor twice; an actor takes a second to start."""

TOTAL = {"cpu": 4.0, "gpu": 2.0, "licence": 1.0}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        called = getattr(item, "callspec", None)
        if called and called.params.get("kind") == "ray" and item.name.startswith(ALIKE_ON_RAY):
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster of this machine: what tests need, and GPUs that are none."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",  # and not what other tests may have started
            num_cpus=4,
            num_gpus=2,
            resources={"licence": 1},
            include_dashboard=False,
            log_to_driver=False,
        )
    yield
    ray.shutdown()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "ray":
        request.getfixturevalue("cluster")
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
