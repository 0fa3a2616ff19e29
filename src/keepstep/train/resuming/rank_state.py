"""What is one rank's own: generators, gradients that no step has used yet, buffers that forwards wrote to."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from keepstep.errors import MismatchError
from keepstep.train import rng
from keepstep.train.data.order import derive_seed
from keepstep.train.ranks.parallel import gradient_like, part_here
from keepstep.train.step import PreparedOptimizer

__all__ = ["Buffers", "FirstBuffers", "Generators", "Gradients", "buffers_of", "dense_parts", "numbered"]

FirstBuffers = Mapping[torch.nn.Module, Mapping[str, "weakref.ref[torch.Tensor]"]]
"""The buffers that models had when they were prepared."""


def buffers_of(model: torch.nn.Module) -> dict[str, weakref.ref[torch.Tensor]]:
    """What to remember of the buffers that a model has now."""
    return {name: weakref.ref(buffer) for name, buffer in model.named_buffers()}


def numbered(kind: str, index: int) -> str:
    """The name of the first, second ... of a kind: "model", "model_1" ..."""
    return kind if index == 0 else f"{kind}_{index}"


class Gradients:
    """Gradients that no step has used yet.

    Of sharded parameters, each rank has the gradients of its parts.

    Args:
        optimizers: prepared ones, in order.
        size: how many ranks there are.
    """

    def __init__(self, optimizers: list[PreparedOptimizer], size: int) -> None:
        self._optimizers = optimizers
        self._size = size
        self._received: dict[str, dict[str, torch.Tensor]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The number of ranks, and {optimizer: {index of the parameter: gradient}} of those that count.

        A zero is not the same as None: the optimizer applies momentum and decay to the one and not the other.
        """
        found = {
            numbered("optimizer", number): {
                str(index): _packed(part_here(parameter.grad))
                for index, parameter in enumerate(optimizer.parameters())
                if parameter.grad is not None
            }
            for number, optimizer in enumerate(self._optimizers)
            if not optimizer.has_spent_gradients
        }
        return {"ranks": self._size, "of": {key: value for key, value in found.items() if value}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the gradients have parameters, and keep them.

        After a change of the number of ranks they are no one's: where they are needed, inside an accumulation
        window, the run's shared state has refused it.
        """
        self._received = {}
        if state["ranks"] != self._size:
            return
        parameters = {
            numbered("optimizer", number): optimizer.parameters()
            for number, optimizer in enumerate(self._optimizers)
        }
        different = []
        for key, gradients in state["of"].items():
            mine = self._received[key] = {}
            for index, packed in gradients.items():
                gradient = _unpacked(packed)
                if gradient is None:
                    different.append(f"gradients/{key}/{index}: its entries lie outside of it")
                elif not _has_shape(parameters.get(key, []), int(index), gradient.shape):
                    shape = list(gradient.shape)
                    different.append(f"gradients/{key}/{index}: no parameter of shape {shape} is there now")
                else:
                    mine[index] = gradient
        if different:
            raise MismatchError("The saved gradients don't fit the optimizers.", different=different)

    def apply(self) -> None:
        """Set every gradient as it was: None where none was pending."""
        for number, optimizer in enumerate(self._optimizers):
            saved = self._received.get(numbered("optimizer", number))
            optimizer.forget_gradients(pending=saved is not None)
            for index, parameter in enumerate(optimizer.parameters()):
                gradient = None if saved is None else saved.get(str(index))
                parameter.grad = None if gradient is None else _placed(parameter, gradient)


def dense_parts(gradient: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a gradient's numbers."""
    sparse = gradient.layout is torch.sparse_coo
    return [gradient._indices(), gradient._values()] if sparse else [gradient]


def _packed(gradient: torch.Tensor) -> torch.Tensor | dict[str, Any]:
    """A gradient as it is saved: of a sparse one, such as an embedding's, its entries."""
    if gradient.layout is not torch.sparse_coo:
        return gradient
    indices, values = dense_parts(gradient)
    shape, coalesced = list(gradient.shape), gradient.is_coalesced()
    return {"indices": indices, "values": values, "shape": shape, "coalesced": coalesced}


def _unpacked(packed: torch.Tensor | dict[str, Any]) -> torch.Tensor | None:
    """What `_packed` was given; None if entries lie outside of the shape."""
    if not isinstance(packed, dict):
        return packed
    try:
        return torch.sparse_coo_tensor(
            packed["indices"],
            packed["values"],
            packed["shape"],
            check_invariants=True,
            is_coalesced=packed["coalesced"],
        )
    except RuntimeError:
        return None


def _placed(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is torch.sparse_coo:
        return gradient.to(parameter.device, copy=True)
    return gradient_like(parameter, gradient)


def _has_shape(parameters: list[torch.nn.Parameter], index: int, shape: torch.Size) -> bool:
    return index < len(parameters) and part_here(parameters[index]).shape == shape


class Buffers:
    """Buffers that a forward on this rank wrote to or replaced, such as a batch norm's averages.

    Ranks see different data, so theirs differ between two forwards (at the next one, rank 0's are sent to
    all). The checkpoint of the model has one rank's; these are put over them. Of one rank alone the model's
    state has all but those with `persistent=False`.

    Args:
        models: as they are saved.
        size: how many ranks there are.
        first: the buffers that they had when they were prepared.
    """

    def __init__(self, models: list[torch.nn.Module], size: int, first: FirstBuffers) -> None:
        self._models = models
        self._size = size
        self._first = first
        self._received: dict[str, dict[str, dict[str, torch.Tensor]]] = {}

    def state_dict(self) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """{model: {"written": {name: buffer}, "replaced": {name: buffer}}}, of those that are either."""
        found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        for number, model in enumerate(self._models):
            first, own = self._first.get(model, {}), self._own(model)
            replaced = {name: it for name, it in own.items() if name in first and first[name]() is not it}
            rest = {name: it for name, it in own.items() if name not in replaced}
            written = {name: it for name, it in rest.items() if it.is_inference() or it._version > 0}
            if written or replaced:
                found[numbered("model", number)] = {"written": written, "replaced": replaced}
        return found

    def _own(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Buffers that the saved state of the model may not have as they are on this rank."""
        if self._size > 1:
            return dict(model.named_buffers())
        return {
            name: buffer
            for prefix, part in model.named_modules()
            for name, buffer in part.named_buffers(prefix, recurse=False)
            if name.rpartition(".")[2] in part._non_persistent_buffers_set
        }

    def load_state_dict(self, state: dict[str, dict[str, dict[str, torch.Tensor]]]) -> None:
        """Keep them."""
        self._received = state

    def apply(self) -> None:
        """Put them over those of the model; what the model no longer has was told when it was restored.

        DDP sends rank 0's buffers to all at each forward: those that the model had when it was wrapped, and
        none that was put in the place of one. So such a one is put in the place of the model's again.
        """
        for number, model in enumerate(self._models):
            saved = self._received.get(numbered("model", number), {"written": {}, "replaced": {}})
            written, replaced = saved["written"], saved["replaced"]
            with torch.no_grad():
                for name, buffer in self._own(model).items():
                    value = replaced.get(name, written.get(name) if buffer.is_inference() else None)
                    if value is not None:
                        owner, _, key = name.rpartition(".")
                        part = model.get_submodule(owner)
                        part._buffers[key] = torch.empty_like(value, device=buffer.device).copy_(value)
                    elif name in written and written[name].shape == buffer.shape:
                        buffer.copy_(written[name])


class Generators:
    """All global random number generators of a rank."""

    def __init__(self) -> None:
        self._received: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """See `rng.capture`."""
        return rng.capture()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keep it."""
        self._received = saved

    def apply(self, *, seed: int, rank: int, step: int) -> None:
        """Go on where they were.

        Args:
            seed: what a rank that was not there when the checkpoint was made begins with, together with
            rank: its number, and
            step: that of the run.
        """
        if self._received is not None:
            rng.restore(self._received)
        else:
            rng.begin(derive_seed(seed, rank, step))
