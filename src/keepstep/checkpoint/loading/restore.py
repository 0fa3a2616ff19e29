"""A checkpoint -> live objects, in place, and only if all of it fits.

Three phases:

1. *Fit*: walk the saved tree and the live objects side by side. Every difference is collected; one
   `MismatchError` names them all, and nothing has been changed. Then plain values are read and decoded.
2. *Hand over*: objects with a `load_state_dict` of their own get their state, read and verified first.
   If one refuses, those before it get their earlier state back. So they do if another rank can't come
   this far: the ranks agree before anything is overwritten.
3. *Read in place*: tensors of modules, optimizers and containers are read straight into the live memory
   and verified in the same pass; then optimizers and containers take their plain values.

Only damage that is met in phase 3 can leave a mixed state; the error then names what was overwritten.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keepstep.checkpoint.collector import collector_paused
from keepstep.checkpoint.format.boxes import Box
from keepstep.checkpoint.loading.fit import Fit
from keepstep.checkpoint.loading.live import call_load, state_of
from keepstep.checkpoint.loading.passes import Target, bytes_of
from keepstep.checkpoint.loading.plan import Handed, Plan
from keepstep.checkpoint.loading.reader import Reader, over_untrusted
from keepstep.checkpoint.loading.sharing import Place, elements_of_box, without_views
from keepstep.errors import DamagedCheckpointError, RestoreError
from keepstep.tree import address_of, inside_object, select, shard_of, tensors_in, unflatten

__all__ = ["load_into", "load_own", "load_tree"]

log = logging.getLogger(__name__)


@collector_paused()
def load_tree(reader: Reader, *, only: tuple[str, ...] | None, verify: bool) -> Any:
    """Rebuild the saved state as new objects, tensors mapped from the files.

    Raises:
        DamagedCheckpointError, UsageError (`only` matches nothing), UnsupportedTypeError (missing codec).
    """
    tree = reader.tree if only is None else over_untrusted(reader, lambda: select(reader.tree, only))
    tensors = reader.mapped(over_untrusted(reader, lambda: list(tensors_in(tree))), verify=verify)
    return over_untrusted(reader, lambda: unflatten(tree, tensors.__getitem__))


@collector_paused()
def load_into(
    reader: Reader,
    objects: Any,
    *,
    only: tuple[str, ...] | None,
    own: Any = None,
    rank: int = 0,
    agree: Callable[[], object] | None = None,
) -> None:
    """Restore live objects; see the module's docstring and `Checkpoint.load_into`."""
    tree = reader.tree if only is None else over_untrusted(reader, lambda: select(reader.tree, only))
    plan = Plan(reader)
    fit = Fit(plan)
    try:
        over_untrusted(reader, lambda: fit.walk(inside_object(tree), objects, (), None))
        if own is not None and (node := _own_node(reader, rank)) is not None:
            over_untrusted(reader, lambda: fit.walk(inside_object(node), own, (f"rank-{rank:05d}",), None))
        plan.raise_if_it_differs()
        finishing = over_untrusted(reader, plan.settle)
    finally:
        plan.settling.clear()  # they hold the plan that holds them; nothing live waits for the collector
    hand_over = _HandOver(reader, plan.handed_over)
    hand_over.run(agree)
    try:
        _read_in_place(reader, plan.places, already=hand_over.done)
        for finish in finishing:
            finish()
    except BaseException as error:
        if not isinstance(error, DamagedCheckpointError):  # which says so itself
            error.add_note(_MIXED)
        raise


def _own_node(reader: Reader, rank: int) -> Any:
    """What was a rank's own, encoded; None, and a warning, if there is nothing for this rank."""
    node = reader.ranks[rank] if rank < len(reader.ranks) else None
    if node is None:
        log.warning(
            "%s holds nothing of rank %d's own (%d ranks saved such): what this rank has stays as it is",
            reader.place,
            rank,
            len(reader.ranks),
        )
    return node


def load_own(reader: Reader, rank: int) -> Any:
    """What was a rank's own, as new objects; None if there is nothing for this rank."""
    node = _own_node(reader, rank)
    tensors = reader.fresh(over_untrusted(reader, lambda: list(tensors_in(node))))
    return over_untrusted(reader, lambda: unflatten(node, tensors.__getitem__))


_MIXED = (
    "The live objects hold parts of the checkpoint by now and are in a mixed state: load one into them "
    "before you go on"
)


# ------------------------------------------------------------------------------ phase 2: hand over


class _HandOver:
    """Objects that load their own state, all or none."""

    def __init__(self, reader: Reader, handed: list[Handed]) -> None:
        self._reader = reader
        self._handed = handed
        self._undo: list[tuple[Handed, Any]] = []

    @property
    def done(self) -> list[str]:
        """Names of the objects that hold the saved state now."""
        return [address_of(handed.path) for handed, _ in self._undo]

    def run(self, agree: Callable[[], object] | None) -> None:
        try:
            for handed in self._handed:
                state, live = self._state_of(handed), state_of(handed.owner, handed.path)
                self._undo.append((handed, _copied(live)))
                call_load(handed.owner, _distributed_as(live, state), handed.path)
            if agree is not None:
                agree()
        except BaseException as error:
            self._roll_back(error)
            raise

    def _state_of(self, handed: Handed) -> Any:
        tensors = self._reader.fresh(over_untrusted(self._reader, lambda: list(tensors_in(handed.node))))
        return over_untrusted(self._reader, lambda: unflatten(handed.node, tensors.__getitem__))

    def _roll_back(self, reason: BaseException) -> None:
        for handed, before in reversed(self._undo):
            try:
                call_load(handed.owner, before, handed.path)
            except RestoreError as error:
                reason.add_note(f"Nor could its earlier state be given back: {error}")


def _distributed_as(live: Any, state: Any) -> Any:
    """A saved state, its whole tensors cut as the live object's distributed ones are."""
    if isinstance(live, torch.Tensor) and isinstance(state, torch.Tensor):
        if shard_of(live) is None or live.shape != state.shape:
            return state
        like = torch.empty_like(live.detach(), dtype=state.dtype)
        part = shard_of(like)
        if part is not None and part[0].numel():
            part[0].copy_(elements_of_box(state, Box(part[1], tuple(part[0].shape))))
        return like
    if isinstance(live, Mapping) and isinstance(state, dict):
        for key in state:
            if key in live:
                state[key] = _distributed_as(live[key], state[key])
    elif isinstance(live, list) and isinstance(state, list):
        state[:] = [_distributed_as(*pair) for pair in zip(live, state, strict=False)] + state[len(live) :]
    return state


def _copied(value: Any) -> Any:
    """A copy of an object's state that its own later changes don't reach."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in {dict, OrderedDict}:
        copied = type(value)((key, _copied(item)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # a module's versions
            copied._metadata = copy.deepcopy(value._metadata)
        return copied
    if type(value) in {list, tuple}:
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


# -------------------------------------------------------------------------- phase 3: read in place


def _read_in_place(reader: Reader, places: Sequence[Place], *, already: list[str]) -> None:
    started: set[str] = set()
    scattered: list[Place] = []
    try:
        targets: dict[str, Target] = {}
        for place in without_views(reader, places):
            alias = reader.entry(place.address).alias_of is not None
            if _is_dense(place.tensor) and not alias and place.address not in targets:
                targets[place.address] = Target(place.address, bytes_of(place.tensor), place.box)
                _tell_autograd(place.tensor)
            else:
                scattered.append(place)
        reader.read_into(list(targets.values()), started=started)
        for place in scattered:  # one at a time: never a second copy of the state
            value = _read_apart(reader, place)
            started.add(address_of(place.path))
            with torch.inference_mode(place.tensor.is_inference()), torch.no_grad():
                place.tensor.copy_(value)
    except DamagedCheckpointError as error:
        if started or already:
            raise type(error)(error.path, error.message, overwritten=[*already, *sorted(started)]) from error
        raise


def _read_apart(reader: Reader, place: Place) -> torch.Tensor:
    """What a place takes, in other memory; of a distributed tensor no more than this rank's part."""
    if place.box is None or reader.entry(place.address).alias_of is not None:
        return elements_of_box(reader.fresh([place.address])[place.address], place.box)
    value = torch.empty(place.box.shape, dtype=place.tensor.dtype)
    reader.read_into([Target(place.address, bytes_of(value), place.box)])
    return value


def _tell_autograd(tensor: torch.Tensor) -> None:
    """A graph that needs the value from before must refuse to go backward, as after any change in place."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its memory can be read into as it lies."""
    hidden = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not hidden
