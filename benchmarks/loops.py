"""One training loop, saved at every step in different ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import accelerate
import torch
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from benchmarks.methods import fsync_all, remove
from benchmarks.settings import EveryStep
from keepstep.train.accelerator import Accelerator
from keepstep.train.settings.config import CheckpointPolicy

__all__ = ["AccelerateLoop", "DcpLoop", "KeepstepLoop", "Loop", "Segment", "TorchLoop"]

_VOCABULARY = 256
_MICRO_BATCH = 8
_HEAD_WIDTH = 32
_KEEP = 2


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Some steps of a loop, on average.

    Attributes:
        step_s: a step with all that belongs to it.
        blocked_s: of that, inside the call that saves.
        waited_s: of that, waiting until the state was copied.
    """

    step_s: float
    blocked_s: float
    waited_s: float


class _Gpt(nn.Module):
    """A decoder of characters, without dropout."""

    def __init__(self, size: EveryStep) -> None:
        super().__init__()
        width = size.width
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // _HEAD_WIDTH), 4 * width, dropout=0.0, batch_first=True
        )
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, _VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.blocks(self.tokens(tokens), mask=mask, is_causal=True)
        logits: torch.Tensor = self.head(hidden)
        return logits


def _nothing() -> None:
    """What is done after a step without a save."""


class Loop:
    """A training loop; ways of saving derive from it.

    Args:
        size: of the model.
        directory: where checkpoints go.

    Attributes:
        name: in the tables.
        durable: whether a checkpoint outlives a power cut.
    """

    name: str
    durable: str

    def __init__(self, size: EveryStep, directory: Path) -> None:
        torch.manual_seed(0)
        self.directory = directory / self.name.replace(" ", "-").replace(",", "")
        self.model: nn.Module = _Gpt(size)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._data = torch.randint(0, _VOCABULARY, (_MICRO_BATCH, size.tokens))
        self.prepare()

    def run(self, samples: int, steps: int, *, saving: bool) -> Segment:
        """Time some steps, each followed by a save; when they begin, one is on its way as in a long run.

        Args:
            samples: of a step.
            steps: how many are timed, after one off the clock: what ran before left its traces in the caches.
            saving: False for the same loop without checkpoints.
        """
        save = self.save if saving else _nothing
        self._step(samples)
        save()
        blocked_s, waited_s = 0.0, self.waited_s()
        began = time.perf_counter()
        for _ in range(steps):
            self._step(samples)
            blocked_s -= time.perf_counter()
            save()
            blocked_s += time.perf_counter()
        took_s = time.perf_counter() - began
        waited_s = self.waited_s() - waited_s
        if saving:
            self.finish()
        return Segment(step_s=took_s / steps, blocked_s=blocked_s / steps, waited_s=waited_s / steps)

    def _step(self, samples: int) -> None:
        for begin in range(0, samples, _MICRO_BATCH):
            batch = self._data[: min(_MICRO_BATCH, samples - begin)]
            logits = self.model(batch)
            self.backward(nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def prepare(self) -> None:
        """Wrap model and optimizer."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def save(self) -> None:
        """Save, or begin to."""

    def finish(self) -> None:
        """Wait for what is on its way; off the clock."""

    def close(self) -> None:
        """Remove what was written."""
        self.finish()
        remove(self.directory)

    def waited_s(self) -> float:
        """How long optimizer steps have waited for a copy so far."""
        return 0.0


class KeepstepLoop(Loop):
    """keepstep's Accelerator, a checkpoint at every step, two kept."""

    durable = "yes"

    def __init__(
        self, size: EveryStep, directory: Path, staging: Literal["auto", "awaited", "overlapped"]
    ) -> None:
        self.name = f"keepstep, {staging}"
        self._staging = staging
        super().__init__(size, directory)

    def prepare(self) -> None:
        self._accelerator = Accelerator(
            cpu=True,
            project_dir=self.directory,
            checkpoint_policy=CheckpointPolicy(every_n_steps=1, keep_last=_KEEP, staging=self._staging),
        )
        self.model, self.optimizer = self._accelerator.prepare(self.model, self.optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def save(self) -> None:
        if self._accelerator.checkpoint() is None:
            raise AssertionError("no checkpoint was due after a step; the loop measures one at every step")

    def finish(self) -> None:
        self._accelerator.wait_for_checkpoint()
        counts = self._accelerator.checkpoint_counts
        if counts.skipped or counts.redone or counts.failed:
            raise AssertionError(f"{self.name} did not save once at every step: {counts}")

    def waited_s(self) -> float:
        return self._accelerator._saver._state.gate.waited_s


class AccelerateLoop(Loop):
    """Accelerate's `save_state` with automatic names, two kept."""

    def __init__(self, size: EveryStep, directory: Path, *, fsync: bool) -> None:
        self.name = "accelerate save_state" + (" + fsync" if fsync else "")
        self.durable = "by fsync" if fsync else "no"
        self._fsync = fsync
        super().__init__(size, directory)

    def prepare(self) -> None:
        project = ProjectConfiguration(
            project_dir=str(self.directory), automatic_checkpoint_naming=True, total_limit=_KEEP
        )
        self._accelerator = accelerate.Accelerator(cpu=True, project_config=project)
        self.model, self.optimizer = self._accelerator.prepare(self.model, self.optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def save(self) -> None:
        path = self._accelerator.save_state()
        if self._fsync:
            fsync_all(Path(path))


class TorchLoop(Loop):
    """`torch.save` of two state dicts into a new file that then takes its name, two kept."""

    def __init__(self, size: EveryStep, directory: Path, *, fsync: bool) -> None:
        self.name = "torch.save" + (" + fsync" if fsync else "")
        self.durable = "by fsync" if fsync else "no"
        self._fsync = fsync
        self._number = 0
        super().__init__(size, directory)

    def save(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.directory / "unfinished.pt"
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, unfinished)
        if self._fsync:
            fsync_all(self.directory)
        unfinished.replace(self.directory / f"{self._number % _KEEP}.pt")
        self._number += 1


class DcpLoop(Loop):
    """DCP's `async_save`, its files fsynced as it does by itself, two kept; a second save waits."""

    name = "dcp async_save"
    durable = "files"

    def prepare(self) -> None:
        self._number = 0
        self._pending: Callable[[], object] | None = None

    def save(self) -> None:
        self.finish()
        remove(self.directory / str(self._number - _KEEP))
        model, optimizer = get_state_dict(self.model, self.optimizer)
        writer = FileSystemWriter(self.directory / str(self._number), thread_count=2)
        response = async_save({"model": model, "optimizer": optimizer}, storage_writer=writer, no_dist=True)
        future: Future[Any] = (
            response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        )
        self._pending = future.result
        self._number += 1

    def finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()
