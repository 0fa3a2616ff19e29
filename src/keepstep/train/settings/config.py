"""What a run is told: frozen, keyword-only, and checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, Literal, get_args

from keepstep.checkpoint.in_flight import Staging
from keepstep.checkpoint.keeping.retention import is_number
from keepstep.checkpoint.place.registry import is_address
from keepstep.checkpoint.saving.staging import BLOCK_BYTES
from keepstep.checkpoint.store import DEFAULT_MEMORY_BUDGET_BYTES
from keepstep.errors import UsageError
from keepstep.train.settings.kwargs import KwargsHandler

__all__ = [
    "CheckpointPolicy",
    "DataLoaderConfiguration",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "ProjectConfiguration",
]


def _require(fine: bool, owner: object, field: str, allowed: str) -> None:
    if not fine:
        name = type(owner).__name__
        raise UsageError(f"{name}({field}={getattr(owner, field)!r}): {field} must be {allowed}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When `accelerator.checkpoint()` saves, and which checkpoints are kept.

    `every_n_steps` and `every_s` say when a checkpoint is wanted; with both, whichever comes first.
    `mean_time_between_failures_s` stands alone instead of them: what a save costs is measured, and saves are
    spaced so that they and the work that failures undo cost least together. With none of the three a
    checkpoint is wanted all the time. `max_overhead` may stand beside each of them, or alone, and holds back
    what would cost more than that.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next.
        every_s: seconds from one checkpoint to the next.
        max_overhead: largest share of the run's time, between 0 and 1, that goes to saves: calls that block,
            steps that wait until the state is copied, and steps that are slower while it is being written.
            0.01 if nothing says when to save.
        mean_time_between_failures_s: how long this run (on all its machines together) goes on average until
            something kills it, in seconds; gives Young's interval.
        when_busy: what becomes of a checkpoint that falls due while another is still being written. "wait":
            the loop waits and saves. "skip": the loop goes on, and the first later call that finds nothing
            being written saves, at that call's step. None: "wait" where it is due by `every_n_steps`, which
            names the steps to save at, else "skip". `Accelerator.checkpoint_counts` counts both.
        keep_last: how many of the newest checkpoints to keep. Without any `keep_` field or byte budget, all,
            which is told after ten.
        keep_best: (metric, "min" or "max", how many): keep the best by a metric that is given when saving.
        keep_every_n_steps: keep each checkpoint whose step is a multiple of this.
        keep_within_s: keep those saved in the last so many seconds; see `Retention`.
        byte_budget: delete old checkpoints that are not otherwise kept once the store is larger, in bytes.
        scrub_interval_s: verify each older checkpoint again after so many seconds, in the background; see
            `Store`. None: don't.
        on_error: what `checkpoint()` does when a save fails, of a full disk say: "raise" ends the loop with
            the error, "warn" logs it and lets the training go on; the next one that is due is tried again.
        staging: "awaited": `checkpoint()` returns once the state is copied. "overlapped": it is copied while
            the next forward and backward run, and optimizers wait for it in `step()`; what else writes to
            saved tensors (an average of the weights) belongs before `checkpoint()`. "auto": the one that
            costs less for a state of its size.
        memory_budget_bytes: most host memory that copies of the state may take; a larger state is copied in
            waves, as its parts are written.

    Raises:
        UsageError: a value is impossible.
    """

    every_n_steps: int | None = None
    every_s: float | None = None
    max_overhead: float | None = None
    mean_time_between_failures_s: float | None = None
    when_busy: Literal["skip", "wait"] | None = None
    keep_last: int | None = None
    keep_best: tuple[str, Literal["min", "max"], int] | None = None
    keep_every_n_steps: int | None = None
    keep_within_s: float | None = None
    byte_budget: int | None = None
    scrub_interval_s: float | None = None
    on_error: Literal["raise", "warn"] = "raise"
    staging: Staging = "auto"
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES

    def __post_init__(self) -> None:
        for field in ("every_n_steps", "keep_last", "keep_every_n_steps", "byte_budget"):
            value = getattr(self, field)
            _require(value is None or _is_count(value), self, field, "an integer of at least 1, or None")
        for field in ("every_s", "keep_within_s", "scrub_interval_s"):
            value = getattr(self, field)
            fine = value is None or (is_number(value) and value > 0)
            _require(fine, self, field, "more than 0 seconds, or None")
        share = self.max_overhead
        fine = share is None or (is_number(share) and 0 < share < 1)
        _require(fine, self, "max_overhead", "a number between 0 and 1, or None")
        _require(self.when_busy in (None, "skip", "wait"), self, "when_busy", '"skip", "wait" or None')
        self._check_failures()
        _require(self.on_error in ("raise", "warn"), self, "on_error", '"raise" or "warn"')
        least = 2 * BLOCK_BYTES
        budget = self.memory_budget_bytes
        fine = _is_count(budget) and budget >= least
        _require(fine, self, "memory_budget_bytes", f"an integer of at least {least} (two blocks)")
        _require(self.staging in get_args(Staging), self, "staging", '"auto", "awaited" or "overlapped"')
        best = self.keep_best
        fine = best is None or (
            isinstance(best, tuple)
            and len(best) == 3
            and isinstance(best[0], str)
            and best[1] in ("min", "max")
            and _is_count(best[2])
        )
        _require(fine, self, "keep_best", '(metric name, "min" or "max", how many), or None')
        whens = (self.every_n_steps, self.every_s, self.mean_time_between_failures_s, share)
        if all(value is None for value in whens):
            object.__setattr__(self, "max_overhead", 0.01)

    def _check_failures(self) -> None:
        """Young's interval stands alone."""
        mean_s = self.mean_time_between_failures_s
        allowed = "more than 0 seconds, or None"
        fine = mean_s is None or (is_number(mean_s) and 0 < mean_s < math.inf)
        _require(fine, self, "mean_time_between_failures_s", allowed)
        for field in ("every_n_steps", "every_s"):
            if mean_s is not None and getattr(self, field) is not None:
                raise UsageError(
                    f"CheckpointPolicy(mean_time_between_failures_s={mean_s!r}, {field}="
                    f"{getattr(self, field)!r}): both say when to save. Leave one of them out; max_overhead "
                    "may be given beside either."
                )


@dataclass(frozen=True, kw_only=True)
class ProjectConfiguration:
    """Where a project keeps its files.

    Args:
        project_dir: checkpoints go to `project_dir/checkpoints/checkpoint_N`; a directory, or a place in a
            bucket ("s3://bucket/project").
        logging_dir: for trackers; `project_dir` if None and a directory.
        mirror: a place in a bucket ("s3://bucket/run") for copies of the automatic checkpoints; see `Store`.
        storage_options: how the bucket is reached; see `Store`. They may hold secrets, which is why they are
            not shown.
        automatic_checkpoint_naming: `save_state()` numbers checkpoints by itself and ignores `output_dir`.
        total_limit: how many of the newest automatic checkpoints to keep; None keeps all.
        iteration: must be 0: numbering goes on from what is on disk.
        save_on_each_node: must be False with one process.

    Raises:
        UsageError: a value is impossible.
    """

    project_dir: str | Path | None = None
    logging_dir: str | Path | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False
    mirror: str | None = None
    storage_options: Mapping[str, Any] | None = dataclass_field(default=None, repr=False)

    def __post_init__(self) -> None:
        fine = self.total_limit is None or _is_count(self.total_limit)
        _require(fine, self, "total_limit", "an integer of at least 1, or None")
        _require(
            self.iteration == 0,
            self,
            "iteration",
            "left at 0: numbering goes on from the checkpoints on disk",
        )
        _require(not self.save_on_each_node, self, "save_on_each_node", "False: there is one process")
        fine = not _in_bucket(self.logging_dir)
        _require(fine, self, "logging_dir", "a directory: trackers write to a disk")
        if self.logging_dir is None and not _in_bucket(self.project_dir):
            object.__setattr__(self, "logging_dir", self.project_dir)

    @property
    def log_dir(self) -> Path | None:
        """Where the run's own log goes: a directory on a disk."""
        place = self.logging_dir if _in_bucket(self.project_dir) else self.project_dir or self.logging_dir
        return None if place is None else Path(place)

    @property
    def checkpoints(self) -> str | Path | None:
        """Where automatic checkpoints go."""
        if self.project_dir is None:
            return None
        if _in_bucket(self.project_dir):
            return f"{str(self.project_dir).rstrip('/')}/checkpoints"
        return Path(self.project_dir) / "checkpoints"


def _in_bucket(place: str | Path | None) -> bool:
    return place is not None and is_address(place)


@dataclass(frozen=True, kw_only=True)
class GradientAccumulationPlugin:
    """How gradients are accumulated over micro-batches.

    Args:
        num_steps: micro-batches to an optimizer step.
        adjust_scheduler: count micro-batches in the scheduler's own call counter, as its warnings expect.
        sync_with_dataloader: the last batch of a loader completes the step, however short the window.
        sync_each_batch: with several ranks, exchange gradients at every micro-batch.

    Raises:
        UsageError: a value is impossible.
    """

    num_steps: int = 1
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        _require(_is_count(self.num_steps), self, "num_steps", "an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class DataLoaderConfiguration:
    """How loaders are prepared.

    Args:
        split_batches: with several ranks, split each batch over them instead of giving each a whole one.
        dispatch_batches: with several ranks, rank 0 alone reads and hands each its share; False: every rank
            reads by itself. None: the former for iterable data sets, and for loaders with an iteration of
            their own; the latter for all others.
        even_batches: with several ranks, all get the same number of batches of the same size; what is missing
            at the end of a pass is filled with samples that were there before.
        use_seedable_sampler: without effect: every order is a function of the seed and the pass, whatever the
            sampler.
        data_seed: what the order of the data and all randomness in loading it derive from; None takes
            `torch.initial_seed()` at the time the first loader is prepared.
        non_blocking: let copies to the device overlap with computation.
        use_stateful_dataloader: without effect: every loader goes on where it was.

    Raises:
        UsageError: a value is impossible.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False

    def __post_init__(self) -> None:
        flags = ("split_batches", "even_batches", "use_seedable_sampler", "non_blocking")
        for field in (*flags, "use_stateful_dataloader"):
            _require(isinstance(getattr(self, field), bool), self, field, "True or False")
        _require(
            self.dispatch_batches in (None, True, False), self, "dispatch_batches", "True, False or None"
        )
        seed = self.data_seed
        fine = seed is None or (isinstance(seed, int) and not isinstance(seed, bool))
        _require(fine, self, "data_seed", "an integer, or None")


@dataclass(frozen=True, kw_only=True)
class GradScalerKwargs(KwargsHandler):
    """Options of the loss scaler that `mixed_precision="fp16"` uses; see `torch.amp.GradScaler`.

    Args:
        init_scale: the first scale.
        growth_factor: by which the scale grows after `growth_interval` steps without overflow.
        backoff_factor: by which it shrinks after an overflow.
        growth_interval: steps without overflow before the scale grows.
        enabled: False leaves losses unscaled.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True

    def to_kwargs(self) -> dict[str, Any]:
        """The options as keyword arguments."""
        return asdict(self)
