"""The facade: names and meaning of Hugging Face Accelerate, and a run that goes on where it was killed.

It forwards to parts that `build.py` chose; nothing here asks which ones they are. The methods are in
`keepstep.train.facade`, by what a script does with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from keepstep.checkpoint.store import Store
from keepstep.track.trackers import Trackers
from keepstep.train.build import Parts, Wishes, build_parts
from keepstep.train.facade.checkpointing import Checkpointing
from keepstep.train.facade.communication import Communication
from keepstep.train.facade.loop import Loop
from keepstep.train.facade.models import Models
from keepstep.train.facade.preparation import Preparation
from keepstep.train.facade.tracking import Tracking
from keepstep.train.preparing import Preparer
from keepstep.train.progress import Progress
from keepstep.train.ranks.seeding import check_rng_type, synchronize_rng_states
from keepstep.train.resuming.saving import Saver
from keepstep.train.resuming.state import TrainState
from keepstep.train.settings.config import (
    CheckpointPolicy,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from keepstep.train.settings.plugins import (
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    RNGType,
    TorchDynamoPlugin,
)
from keepstep.train.states import AcceleratorState, GradientState
from keepstep.train.step import AccumulationWindow

__all__ = ["Accelerator"]


class Accelerator(Preparation, Loop, Checkpointing, Communication, Models, Tracking):
    """Runs a plain training loop so that its progress is never lost.

    Args:
        device_placement: put models and batches onto `device`.
        split_batches: with several ranks, split each batch over them instead of giving each a whole one.
        mixed_precision: "no", "bf16" or "fp16"; None reads KEEPSTEP_MIXED_PRECISION, else "no".
        gradient_accumulation_steps: micro-batches to an optimizer step.
        cpu: train on the CPU even if there is an accelerator.
        dataloader_config: more about loaders.
        fsdp_plugin: shard parameters over the ranks.
        deepspeed_plugin, torch_tp_plugin, megatron_lm_plugin, deepspeed_plugins, parallelism_config: refused:
            keepstep has no backend for them.
        log_with: trackers that `log` writes to beside the run's own log: a name ("tensorboard", "wandb",
            "mlflow", "comet_ml", "csv", "jsonl"), "all" for every one whose package is installed, a
            `LoggerType`, an instance of a `GeneralTracker`, or a list of these.
        project_dir: automatic checkpoints go to `project_dir/checkpoints/checkpoint_N`.
        project_config: more about the project's files.
        gradient_accumulation_plugin: more about accumulation, instead of `gradient_accumulation_steps`.
        step_scheduler_with_optimizer: schedulers step only when their optimizers do.
        kwargs_handlers: of `AutocastKwargs`, `DistributedDataParallelKwargs`, `GradScalerKwargs`,
            `InitProcessGroupKwargs` and `ProfileKwargs`, at most one each.
        dynamo_backend: compile models with this backend of `torch.compile`.
        dynamo_plugin: more about compiling, instead of `dynamo_backend`.
        rng_types: generators that take rank 0's state whenever a loader begins a pass: "torch", "cuda" ...;
            None for none of them: the order of data needs none.
        dispatch_batches: see `DataLoaderConfiguration`.
        even_batches: see `DataLoaderConfiguration`.
        checkpoint_policy: when `checkpoint()` saves and what is kept. None saves as often as costs at most
            1 % of the run's time, keeps the 3 newest of those, and all that `save_state()` wrote.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = False,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: Sequence[str | RNGType] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[Any] | None = None,
        dynamo_backend: DynamoBackend | str | None = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
        *,
        dispatch_batches: bool | None = None,
        even_batches: bool = True,
        checkpoint_policy: CheckpointPolicy | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in Wishes.__dataclass_fields__}
        self._set_up(build_parts(Wishes(**given)))

    def _set_up(self, parts: Parts) -> None:
        self._parts = parts
        self.process = parts.process
        self.device = parts.process.device
        self.project_configuration = parts.project
        self.split_batches = parts.loading.split_batches
        self._world = parts.process.world
        self._parallel = parts.parallel
        self._precision = parts.precision
        progress = Progress()
        self._window = AccumulationWindow(parts.accumulation, progress.at_last_batch)
        self.gradient_state = GradientState.of(self._window, progress)
        self.state = AcceleratorState.of(
            parts.process,
            mixed_precision=parts.precision.name,
            distributed_type=parts.parallel.kind,
        )
        self._state = TrainState(
            world=self._world,
            parallel=parts.parallel,
            precision=parts.precision,
            window=self._window,
            progress=progress,
            seed=parts.loading.data_seed,
        )
        self._make_preparer(parts)
        self._make_keepers(parts)

    def _make_preparer(self, parts: Parts) -> None:
        self._preparer = Preparer(
            self._state,
            device=self.device if parts.wishes.device_placement else None,
            placement=parts.placement,
            parallel=parts.parallel,
            compiling=parts.compiling,
            scheduler_steps=1 if self.split_batches else self._world.size,
            loading=parts.loading,
            at_pass_start=_synchronizing(parts),
            step_with_optimizer=parts.wishes.step_scheduler_with_optimizer,
        )

    def _make_keepers(self, parts: Parts) -> None:
        """What saves the run, and what logs it; each asks the other."""
        self._saver = Saver(
            state=self._state,
            store=_store(parts),
            project=parts.project,
            policy=parts.policy,
            pin_explicit=parts.pin_explicit_saves,
            provenance=lambda: self._trackers.provenance(),  # noqa: PLW0108 (it is made below)
        )
        self._trackers = Trackers(
            parts.wishes.log_with,
            state=self._state.log,
            is_main=self._world.rank == 0,
            logging_dir=parts.project.logging_dir,
            log_dir=parts.project.log_dir,
            run=lambda: self._saver.run,
            steps_done=lambda: self._state.step,
            may_resume=lambda: self._saver.may_resume,
        )


def _synchronizing(parts: Parts) -> Callable[[], None] | None:
    """What keeps the ranks' generators alike when a loader begins a pass; None if nobody asked for it."""
    # Orders, for which Accelerate has "generator", are the same on all ranks by themselves.
    types = [str(kind) for kind in parts.wishes.rng_types or () if str(kind) != "generator"]
    for kind in types:
        check_rng_type(kind)
    if not types or parts.process.world.size == 1:
        return None
    return lambda: synchronize_rng_states(types)


def _store(parts: Parts) -> Store | None:
    """Where automatic checkpoints go; None without a project directory."""
    place = parts.project.checkpoints
    if place is None:
        return None
    return Store(
        place,
        mirror=parts.project.mirror,
        storage_options=parts.project.storage_options,
        retention=parts.retention,
        world=parts.process.world,
        spare_other_runs=True,
        scrub_interval_s=parts.policy.scrub_interval_s,
        memory_budget_bytes=parts.policy.memory_budget_bytes,
    )
