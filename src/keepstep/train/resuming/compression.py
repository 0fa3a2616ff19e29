"""What compressed gradients leave over on each rank: PowerSGD's errors, factors, generator and count."""

from __future__ import annotations

import logging
from typing import Any

import torch

from keepstep.train.ranks.parallel import Parallel
from keepstep.train.resuming.rank_state import numbered

__all__ = ["Compression"]

_log = logging.getLogger(__name__)


class Compression:
    """PowerSGD's state of each model that uses it.

    Each rank adds to its next gradients what compression has cut off the last ones. Ranks count backward
    passes, too, and compress from a certain one on, so that either all go on or all begin anew.

    Args:
        models: as they are saved.
        parallel: how the ranks share them.
        size: how many ranks there are.
    """

    def __init__(self, models: list[torch.nn.Module], parallel: Parallel, size: int) -> None:
        self._models = models
        self._parallel = parallel
        self._size = size
        self._received: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{model: state} of the models whose gradients are compressed."""
        found: dict[str, dict[str, Any]] = {}
        for number, model in enumerate(self._models):
            state = self._parallel.compression_of(model)
            if state is not None:
                found[numbered("model", number)] = {
                    "fits": self._fits(model, state),
                    "iteration": state.iter,
                    "generator": state.rng.get_state(legacy=False),
                    # A backward puts another tensor in the place of an error, and writes to the factors.
                    "errors": {str(bucket): error for bucket, error in state.error_dict.items()},
                    "left": {str(bucket): factor.clone() for bucket, factor in state.p_memory_dict.items()},
                    "right": {str(bucket): factor.clone() for bucket, factor in state.q_memory_dict.items()},
                }
        return found

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Keep it."""
        self._received = state

    def apply(self) -> None:
        """Go on where each was, unless gradients travel in other pieces now."""
        for number, model in enumerate(self._models):
            state = self._parallel.compression_of(model)
            saved = self._received.get(numbered("model", number))
            if state is None or saved is None:
                continue
            if saved["fits"] != self._fits(model, state):
                _log.warning(
                    "The gradients of model %d were compressed as %s and are as %s now: PowerSGD begins "
                    "anew, without the errors that were to be made good.",
                    number,
                    saved["fits"],
                    self._fits(model, state),
                )
                continue
            device = next(model.parameters()).device
            state.iter = saved["iteration"]
            state.rng.set_state(saved["generator"])
            state.error_dict = _by_bucket(saved["errors"], device)
            state.p_memory_dict = _by_bucket(saved["left"], device)
            state.q_memory_dict = _by_bucket(saved["right"], device)

    def _fits(self, model: torch.nn.Module, state: Any) -> dict[str, Any]:
        """What has to be the same, so that each bucket is of the same gradients."""
        return {
            "ranks": self._size,
            "elements": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "rank": state.matrix_approximation_rank,
            "batched": state.batch_tensors_with_same_shape,
            **self._parallel.buckets(),
        }


def _by_bucket(saved: dict[str, torch.Tensor], device: torch.device) -> dict[int, torch.Tensor]:
    return {int(bucket): tensor.to(device) for bucket, tensor in saved.items()}
