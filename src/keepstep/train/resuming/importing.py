"""A run that goes on from a checkpoint of Hugging Face Accelerate's.

Everything is compared first, and one error names all that differs. Then objects that may refuse their state
are handed it (and get their earlier one back if another refuses), optimizers and models last.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from keepstep.checkpoint.convert.accelerate import AccelerateState, newest_accelerate_state
from keepstep.errors import MismatchError, RestoreError
from keepstep.models.loading import differences_of, fill
from keepstep.train.resuming.rank_state import Generators
from keepstep.train.resuming.state import TrainState

__all__ = ["Importer", "tell_of_earlier"]

_log = logging.getLogger(__name__)


class Importer:
    """Restores a `TrainState` from what Accelerate saved.

    Args:
        state: of the run.
        found: what there is for this rank.
    """

    def __init__(self, state: TrainState, found: AccelerateState) -> None:
        self._state = state
        self._found = found

    def check(self) -> None:
        """See whether it fits; nothing is changed.

        Raises:
            MismatchError: naming all that doesn't.
        """
        state, found = self._state, self._found
        counts = [
            ("models", len(found.models), len(state.models)),
            ("optimizers", len(found.optimizers), len(state.optimizers)),
            ("schedulers", len(found.schedulers), len(state.schedulers)),
            ("objects registered for checkpointing", len(found.registered), len(state.registered)),
        ]
        different = [
            f"{was} {what} were saved, and {now} are here" for what, was, now in counts if was != now
        ]
        for number, (model, weights) in enumerate(zip(state.models, found.models, strict=False)):
            different += [f"model {number}: {text}" for text in differences_of(model, weights)]
        for number, (prepared, saved) in enumerate(zip(state.optimizers, found.optimizers, strict=False)):
            parameters = [group["params"] for group in prepared.optimizer.param_groups]
            different += [f"optimizer {number}: {text}" for text in _optimizer(parameters, saved)]
        if (found.scaler is not None) != (state.precision.name == "fp16"):
            was = "fp16" if found.scaler is not None else "another precision than fp16"
            different.append(f"mixed_precision was {was}, and is {state.precision.name!r} now")
        if different:
            raise MismatchError(
                f"{found.path}, which Accelerate wrote, doesn't fit this run; nothing was changed.",
                different=different,
            )

    def run(self, generators: Generators, agree: Callable[[], object]) -> AccelerateState:
        """Restore it; `check` comes first.

        Args:
            generators: take note of those saved, and are put into effect once everything else is.
            agree: called once objects have taken their state, before anything is overwritten; if it raises,
                they are given their earlier one back.

        Raises:
            RestoreError: an object refused its state; those before it have their earlier one again.
        """
        state, found = self._state, self._found
        self._hand_over(agree)
        for prepared, saved in zip(state.optimizers, found.optimizers, strict=True):
            prepared.optimizer.load_state_dict(saved)
            prepared.steps_done, prepared.step_was_skipped = _steps(saved), False
        for model, weights in zip(state.models, found.models, strict=True):
            fill(model, weights)
        if found.scaler is not None:
            state.precision.load_state_dict(found.scaler)
        if found.generators is not None:
            generators.load_state_dict(_as_captured(found.generators))
        self._tell_what_is_not_there()
        return found

    def _hand_over(self, agree: Callable[[], object]) -> None:
        """Schedulers and registered objects: all of them or none, on all ranks or none."""
        state, found = self._state, self._found
        schedulers = [prepared.scheduler for prepared in state.schedulers]
        undo: list[tuple[Callable[[Any], Any], Any]] = []
        pairs = zip([*schedulers, *state.registered], [*found.schedulers, *found.registered], strict=True)
        try:
            for owner, saved in pairs:
                undo.append((owner.load_state_dict, copy.deepcopy(owner.state_dict())))
                self._call_load(owner, saved)
            agree()
        except BaseException:
            for load, before in reversed(undo):
                load(before)
            raise

    def _call_load(self, owner: Any, saved: Any) -> None:
        try:
            owner.load_state_dict(saved)
        except Exception as error:  # the object's own code
            raise RestoreError(
                f"{type(owner).__name__}.load_state_dict refused what {self._found.path} holds: "
                f"{error!r}. Nothing was changed"
            ) from error

    def _tell_what_is_not_there(self) -> None:
        ignored = f" ({', '.join(self._found.loaders)} not read)" if self._found.loaders else ""
        _log.warning(
            "%s was written by Accelerate, which keeps no place in the data%s: loaders begin their pass "
            "anew. To go on inside an epoch, pass over what was trained on with skip_first_batches(). "
            "Checkpoints of keepstep keep the place.",
            self._found.path,
            ignored,
        )
        if self._found.generators is None:
            _log.warning("%s holds no random states of this rank; they are seeded anew", self._found.path)


def tell_of_earlier(checkpoints: Path | str | None) -> None:
    """A run that begins anew beside checkpoints of Accelerate's should know of them."""
    earlier = newest_accelerate_state(checkpoints)
    if earlier is not None:
        _log.warning(
            "resume() begins anew beside %s, which Accelerate wrote. load_state() goes on from there", earlier
        )


def _optimizer(groups: list[list[torch.Tensor]], saved: Mapping[str, Any]) -> list[str]:
    """What of a saved optimizer state doesn't fit these parameters."""
    sizes, were = [len(group) for group in groups], [len(group["params"]) for group in saved["param_groups"]]
    if sizes != were:
        return [f"its groups had {were} parameters, and have {sizes} now"]
    parameters = [parameter for group in groups for parameter in group]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    different = []
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            shaped = isinstance(value, torch.Tensor) and value.dim() > 0 and value.dim() == parameter.dim()
            if shaped and value.shape != parameter.shape and value.numel() != 1:
                shapes = f"{list(value.shape)}, and the parameter {list(parameter.shape)}"
                different.append(f"{name} of parameter {number} has the shape {shapes}")
    return different


def _steps(saved: Mapping[str, Any]) -> int:
    """Steps that an optimizer had done, as far as its state says."""
    return max((int(state["step"]) for state in saved["state"].values() if "step" in state), default=0)


def _as_captured(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Accelerate's random states in the form of `rng.capture`."""
    version, words, gauss = saved["random_state"]
    tree: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "torch": saved["torch_manual_seed"],
    }
    numpy_state = saved.get("numpy_random_seed")
    if numpy_state is not None:
        kind, key, position, has_gauss, held = numpy_state
        tree["numpy"] = {
            "bit_generator": str(kind),
            "state": {"key": key, "pos": int(position)},
            "has_gauss": int(has_gauss),
            "gauss": float(held),
        }
    devices = saved.get("torch_cuda_manual_seed") or saved.get("torch_xpu_manual_seed")
    if devices:
        tree["accelerator"] = list(devices)
    return tree
