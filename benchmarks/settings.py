"""How large and how often: the only knobs of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "FULL",
    "QUICK",
    "SIZES",
    "TINY",
    "EveryStep",
    "Frozen",
    "Point",
    "Scale",
    "Settings",
    "Size",
    "Tuning",
]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the curve over step times.

    Attributes:
        step_s: how long a step is meant to take without checkpoints.
        steps: timed steps of a segment of the loop.
        rounds: segments of what is promised, automatic saves; each lies between two without checkpoints.
        other_rounds: segments of each other way of saving.
    """

    step_s: float
    steps: int
    rounds: int
    other_rounds: int


@dataclass(frozen=True, kw_only=True)
class EveryStep:
    """A small GPT that is saved at every optimizer step.

    Attributes:
        width, layers: of the model.
        tokens: length of a sample.
        points: the curve.
    """

    width: int
    layers: int
    tokens: int
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A frozen base with an adapter that is trained.

    Attributes:
        width, layers: of the base; a layer has width ** 2 parameters.
        rank: the adapter has 2 * width * rank parameters.
        checkpoints: how many are kept.
        peer_saves: how often a peer saves; its saves are all alike.
    """

    width: int
    layers: int
    rank: int
    checkpoints: int
    peer_saves: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Two or more counts of each, rising, to see how time grows with them.

    Attributes:
        manifests: checkpoints of a store.
        tensors: of a state.
        ranks: of a simulated run.
        sharded: tensors that are spread over all of those ranks.
    """

    manifests: tuple[int, ...]
    tensors: tuple[int, ...]
    ranks: tuple[int, ...]
    sharded: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Experiments of trivial trials, two at a time.

    Attributes:
        trials, reports: of an experiment.
        checkpoint_bytes: of a report, where there are checkpoints.
        steps, step_s: reports of a trial while memory is watched, and how far apart they are.
        many: trials of the experiment in one process.
        rounds: in which the contenders take turns.
    """

    trials: int
    reports: int
    checkpoint_bytes: int
    steps: int
    step_s: float
    many: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is saved and loaded, and how many rounds are timed.

    Attributes:
        name: how `--size` of a child process names it.
        width, layers, vocabulary: of the GPT-like model whose AdamW state is saved.
        rounds: timed rounds of each comparison.
        cold_rounds, cold_s: rounds that begin with a rest of so many seconds.
        tensor_counts: points of the small-tensor curve.
        dcp_up_to: dcp is left out of the curve beyond this many tensors.
        checkpoints: how many `keepstep ls` lists.
        calls: of a function that takes microseconds.
        starts: processes whose start is timed.
        memory_budget_bytes: of the background save whose peak memory is measured.
        every_step: the loop that saves at every step.
        frozen: the checkpoints of a frozen base.
        scale: how many of what is counted.
        tuning: experiments.
        disk_bytes: most that is on disk at a time.
    """

    name: str
    width: int
    layers: int
    vocabulary: int
    rounds: int
    cold_rounds: int
    cold_s: float
    tensor_counts: tuple[int, ...]
    dcp_up_to: int
    checkpoints: int
    calls: int
    starts: int
    memory_budget_bytes: int
    every_step: EveryStep
    frozen: Frozen
    scale: Scale
    tuning: Tuning
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run.

    Attributes:
        size: what is measured.
        directory: on the disk to be measured; everything is written below it and removed.
        ray_python: the interpreter that has Ray Tune; None: this one, if it has it.
    """

    size: Size
    directory: Path
    ray_python: Path | None = None


FULL = Size(
    name="full",
    width=768,
    layers=12,
    vocabulary=50257,
    rounds=3,
    cold_rounds=3,
    cold_s=4.0,
    tensor_counts=(1_000, 10_000, 30_000, 100_000),
    dcp_up_to=10_000,
    checkpoints=1_000,
    calls=100_000,
    starts=9,
    memory_budget_bytes=512 << 20,
    every_step=EveryStep(
        width=384,
        layers=6,
        tokens=128,
        points=(
            Point(step_s=0.1, steps=8, rounds=4, other_rounds=2),
            Point(step_s=0.3, steps=4, rounds=6, other_rounds=2),
            Point(step_s=0.4, steps=2, rounds=24, other_rounds=3),
            Point(step_s=1.0, steps=1, rounds=24, other_rounds=3),
            Point(step_s=3.0, steps=1, rounds=3, other_rounds=1),
        ),
    ),
    frozen=Frozen(width=2048, layers=24, rank=256, checkpoints=20, peer_saves=3),
    scale=Scale(manifests=(1_000, 4_000), tensors=(10_000, 100_000), ranks=(64, 1_024), sharded=32),
    tuning=Tuning(
        trials=32, reports=20, checkpoint_bytes=10_000_000, steps=30, step_s=0.1, many=10_000, rounds=3
    ),
    disk_bytes=12 << 30,
)
QUICK = Size(
    name="quick",
    width=512,
    layers=6,
    vocabulary=32_000,
    rounds=3,
    cold_rounds=1,
    cold_s=4.0,
    tensor_counts=(1_000, 3_000, 10_000, 30_000),
    dcp_up_to=1_000,
    checkpoints=1_000,
    calls=20_000,
    starts=5,
    memory_budget_bytes=128 << 20,
    every_step=EveryStep(
        width=384,
        layers=6,
        tokens=128,
        points=(
            Point(step_s=0.1, steps=4, rounds=1, other_rounds=1),
            Point(step_s=0.4, steps=2, rounds=2, other_rounds=1),
            Point(step_s=1.0, steps=1, rounds=2, other_rounds=1),
        ),
    ),
    frozen=Frozen(width=1024, layers=24, rank=128, checkpoints=20, peer_saves=2),
    scale=Scale(manifests=(250, 1_000), tensors=(10_000, 100_000), ranks=(64, 512), sharded=16),
    tuning=Tuning(
        trials=8, reports=20, checkpoint_bytes=10_000_000, steps=20, step_s=0.1, many=2_000, rounds=1
    ),
    disk_bytes=4 << 30,
)
TINY = Size(
    name="tiny",
    width=32,
    layers=1,
    vocabulary=64,
    rounds=1,
    cold_rounds=1,
    cold_s=0.0,
    tensor_counts=(10, 100),
    dcp_up_to=100,
    checkpoints=5,
    calls=100,
    starts=1,
    memory_budget_bytes=16 << 20,
    every_step=EveryStep(
        width=32, layers=1, tokens=8, points=(Point(step_s=0.005, steps=2, rounds=1, other_rounds=1),)
    ),
    frozen=Frozen(width=256, layers=8, rank=2, checkpoints=4, peer_saves=1),
    scale=Scale(manifests=(2, 6), tensors=(100, 1_000), ranks=(2, 6), sharded=3),
    tuning=Tuning(trials=2, reports=2, checkpoint_bytes=10_000, steps=2, step_s=0.3, many=20, rounds=1),
    disk_bytes=1 << 20,
)
SIZES = {size.name: size for size in (FULL, QUICK, TINY)}
