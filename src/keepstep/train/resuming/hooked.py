"""Hooks of scripts around saving and restoring: files of their own, and models that they see to themselves.

A checkpoint appears by one rename, and all that is in it is verified. So a hook is given an empty directory;
what it writes there becomes part of the checkpoint, as `files.safetensors`. A hook that loads is given a
directory with just these files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from keepstep.checkpoint.place.registry import is_address
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import UsageError
from keepstep.models.states import full_state
from keepstep.train.resuming.rank_state import numbered
from keepstep.tree import items_of
from keepstep.world import World

__all__ = ["FILES", "LoadHook", "SaveHook", "StateHooks"]

FILES = "files"
"""The root key under which a checkpoint has the files of hooks."""

_PREFIX = ".keepstep-hooks-"

SaveHook = Callable[[list[torch.nn.Module], list[dict[str, Any]], str], Any]
LoadHook = Callable[[list[torch.nn.Module], str], Any]


class StateHooks:
    """What `register_save_state_pre_hook` and `register_load_state_pre_hook` were given.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._saving: OrderedDict[int, SaveHook] = OrderedDict()
        self._loading: OrderedDict[int, LoadHook] = OrderedDict()

    def on_save(self, hook: SaveHook) -> RemovableHandle:
        """Call a hook before each save."""
        handle = RemovableHandle(self._saving)
        self._saving[handle.id] = hook
        return handle

    def on_load(self, hook: LoadHook) -> RemovableHandle:
        """Call a hook before each restore."""
        handle = RemovableHandle(self._loading)
        self._loading[handle.id] = hook
        return handle

    # ----------------------------------------------------------------------------------------- saving

    def before_save(
        self,
        models: Sequence[torch.nn.Module],
        shared: dict[str, Any],
        place: str | os.PathLike[str],
    ) -> dict[str, Any]:
        """Call the hooks.

        Args:
            models: of the run.
            shared: what is going to be saved.
            place: where to: the directory of a checkpoint or a store, or a bucket's address.

        Returns:
            The same without models that a hook sees to, and with the files that hooks wrote.

        Raises:
            UsageError: a hook put weights into the list that are of no model.
        """
        if not self._saving:
            return shared
        weights = [full_state(model) for model in models]
        before = list(weights)
        with self._directory(place) as directory:
            for hook in list(self._saving.values()):
                hook(list(models), weights, str(directory))
            self._world.barrier()
            files = _mapped(directory)
        unknown = [state for state in weights if not any(state is known for known in before)]
        if unknown:
            raise UsageError(
                "a hook of register_save_state_pre_hook put weights of its own into the list, and keepstep "
                "saves models as they are. Take a model's weights out of the list (weights.pop()), and write "
                "what is to be kept instead to a file in output_dir"
            )
        left_out = {
            numbered("model", number)
            for number, state in enumerate(before)
            if not any(state is kept for kept in weights)
        }
        kept = {name: value for name, value in shared.items() if name not in left_out}
        return {**kept, FILES: files} if files else kept

    @contextlib.contextmanager
    def _directory(self, place: str | os.PathLike[str]) -> Iterator[Path]:
        """An empty directory that all ranks see, and that is gone afterwards; mapped files stay."""
        made = None
        if self._world.rank == 0:
            beside = None
            prefix = _PREFIX
            if self._world.size > 1 and not is_address(place):  # ranks may be on several machines
                at = Path(place).resolve()
                beside, prefix = at.parent, f"{_PREFIX}{at.name}-"
                beside.mkdir(parents=True, exist_ok=True)
                _sweep(beside, prefix)
            made = tempfile.mkdtemp(prefix=prefix, dir=beside)
        directory = Path(self._world.broadcast(made or ""))
        try:
            yield directory
            self._world.barrier()
        finally:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)

    # ---------------------------------------------------------------------------------------- loading

    def load_into(
        self,
        checkpoint: Checkpoint,
        models: Sequence[torch.nn.Module],
        shared: dict[str, Any],
        own: Any,
        agree: Callable[[], object],
    ) -> None:
        """Call the hooks, then restore what they left.

        Args:
            checkpoint: to restore.
            models: of the run.
            shared: live objects.
            own: those of this rank alone.
            agree: see `Checkpoint.load_into`.
        """
        holds_files = any(name.startswith(FILES) for name in checkpoint.manifest.files)
        if not self._loading and not holds_files:
            checkpoint.load_into(shared, per_rank=own, rank=self._world.rank, agree=agree)
            return
        names = [str(key) for key, _ in items_of(checkpoint.reader().tree) or ()]
        left = list(models)
        if self._loading:
            with tempfile.TemporaryDirectory(prefix=_PREFIX) as directory:
                if FILES in names:
                    _unpack(checkpoint.load(FILES)[FILES], Path(directory))
                for hook in list(self._loading.values()):
                    hook(left, directory)
        left_out = {
            numbered("model", number)
            for number, model in enumerate(models)
            if not any(model is kept for kept in left)
        }
        live = {name: value for name, value in shared.items() if name not in left_out}
        wanted = [name for name in names if name != FILES and name not in left_out]
        only = wanted if len(wanted) < len(names) else None
        checkpoint.load_into(live, only, per_rank=own, rank=self._world.rank, agree=agree)


def _sweep(beside: Path, prefix: str) -> None:
    """Remove directories of earlier saves to the same place.

    A kill leaves one, and so does a network file system that keeps files as long as they are mapped. No other
    save to this place runs beside the one that is about to begin.
    """
    of_this_place = re.compile(re.escape(prefix) + r"[^.-]+")
    for path in beside.iterdir():
        if of_this_place.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _mapped(directory: Path) -> dict[str, torch.Tensor]:
    """The files below a directory by their names, as bytes that are read when they are needed."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): (
            torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            if path.stat().st_size
            else torch.empty(0, dtype=torch.uint8)
        )
        for path in files
    }


def _unpack(files: dict[str, torch.Tensor], directory: Path) -> None:
    for name, data in files.items():
        path = directory / name
        if path.resolve().is_relative_to(directory.resolve()):
            path.parent.mkdir(parents=True, exist_ok=True)
            data.numpy().tofile(path)
