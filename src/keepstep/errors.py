"""Every exception that keepstep raises on purpose.

Each message says what happened, the value, what is allowed and what to do next.

    KeepstepError
    ├── StateError                 a state that cannot be saved as it is
    │   ├── UnsupportedTypeError   a leaf whose type has no codec (also a TypeError)
    │   ├── StateStructureError    cycles, nesting too deep, keys that cannot be kept
    │   ├── TensorNotSavableError  meta, sparse, quantized or otherwise without plain bytes
    │   └── DirectoryNotSavableError  a directory with links or odd names, or that changes while it is read
    ├── StateChangedError          tensors were written to while they were copied in the background
    ├── StoreError                 the place where checkpoints live refuses
    │   ├── DirectoryNotOursError  a directory that holds something else (also a FileExistsError)
    │   ├── StoreBusyError         another process writes to this store
    │   ├── CheckpointBusyError    a checkpoint that is to be deleted is being read
    │   ├── StoreReadOnlyError     no permission to write (also a PermissionError)
    │   ├── NoSpaceError           the disk is full (also an OSError with ENOSPC)
    │   ├── NoThreadError          the system starts no more threads (also a RuntimeError)
    │   ├── BucketError            an object store can't be reached, or refuses
    │   └── CheckpointNotFoundError  no checkpoint of that name (also a FileNotFoundError)
    ├── DamagedCheckpointError     bytes on disk are not what was committed
    │   ├── ManifestError          manifest.json is missing, mangled or hostile
    │   │   └── SchemaVersionError   written by a newer keepstep
    │   ├── MissingFileError       a file that the manifest names is not there
    │   ├── FileSizeError          a file is shorter or longer than committed
    │   └── DigestError            a digest differs: flipped bits
    ├── NoValidCheckpointError     there are checkpoints, and every one of them is damaged
    ├── MismatchError              a sound checkpoint that does not fit the live objects
    ├── RestoreError               an object's own load_state_dict, or a codec, raised
    ├── ForeignTypeError           another library's file that only running it could read (also a TypeError)
    ├── MirrorError                a committed checkpoint could not be copied to the mirror
    ├── BackgroundSaveError        a save in the background failed; raised at the next call
    ├── StillSavingError           a save takes longer than it was waited for (also a TimeoutError)
    ├── NoBatchFitsError           memory runs out even with the smallest batch (also a RuntimeError)
    ├── RankError                  something that all ranks do together came to nothing
    │   ├── RankMissingError       ranks did not come within the time-out
    │   ├── RankFailedError        another rank raised
    │   ├── CollectiveMismatchError  ranks called different things, or gave them other shapes
    │   └── RanksDifferError       ranks hold states that are not of one model (also a StateError)
    ├── TuneError                  an experiment of many trials
    │   ├── TrialError             a trial failed; its message names it
    │   ├── ExperimentExistsError  another experiment has that name (also a FileExistsError)
    │   ├── ExperimentNotFoundError  no experiment there (also a FileNotFoundError)
    │   ├── NoResultError          no trial has what was asked for (also a RuntimeError)
    │   ├── ExperimentBusyError    another process runs this experiment
    │   └── JournalError           an experiment's journal is damaged
    └── UsageError                 a call or configuration that cannot work (also a ValueError)
        ├── MissingPackageError    an optional package is not installed (also an ImportError)
        ├── NotTensorError         something else where tensors are expected (also a TypeError)
        └── NotPreparedError       an object that has to go through prepare() first
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "BackgroundSaveError",
    "BucketError",
    "CheckpointBusyError",
    "CheckpointNotFoundError",
    "CollectiveMismatchError",
    "DamagedCheckpointError",
    "DigestError",
    "DirectoryNotOursError",
    "DirectoryNotSavableError",
    "ExperimentBusyError",
    "ExperimentExistsError",
    "ExperimentNotFoundError",
    "FileSizeError",
    "ForeignTypeError",
    "JournalError",
    "KeepstepError",
    "ManifestError",
    "MirrorError",
    "MismatchError",
    "MissingFileError",
    "MissingPackageError",
    "NoBatchFitsError",
    "NoResultError",
    "NoSpaceError",
    "NoThreadError",
    "NoValidCheckpointError",
    "NotPreparedError",
    "NotTensorError",
    "RankError",
    "RankFailedError",
    "RankMissingError",
    "RanksDifferError",
    "RestoreError",
    "SchemaVersionError",
    "StateChangedError",
    "StateError",
    "StateStructureError",
    "StillSavingError",
    "StoreBusyError",
    "StoreError",
    "StoreReadOnlyError",
    "TensorNotSavableError",
    "TrialError",
    "TuneError",
    "UnsupportedTypeError",
    "UsageError",
]


class KeepstepError(Exception):
    """Base class of everything that keepstep raises on purpose."""

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""  # OSError would put "[Errno 17]" in front


class StateError(KeepstepError):
    """A state cannot be saved as it is; nothing was written."""


class UnsupportedTypeError(StateError, TypeError):
    """A leaf has a type that keepstep does not store (it never pickles)."""


class StateStructureError(StateError, ValueError):
    """A state contains itself, is nested too deep, or has keys that cannot be kept apart."""


class TensorNotSavableError(StateError, ValueError):
    """A tensor has no plain bytes to write: meta, sparse, quantized, or a subclass with hidden parts."""


class DirectoryNotSavableError(StateError, ValueError):
    """A directory that was handed over can't be saved: links, odd names, or it changed meanwhile."""


class StateChangedError(KeepstepError):
    """Tensors were written to while they were being copied in the background; nothing was committed.

    Attributes:
        tensors: their addresses in the state.
    """

    def __init__(self, tensors: Sequence[str]) -> None:
        self.tensors = tuple(tensors)
        shown = ", ".join(map(repr, self.tensors[:3]))
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        super().__init__(
            f"{shown}{more} changed while a checkpoint copied them in the background, so it was not "
            "committed. Step optimizers that went through prepare(), write to saved tensors only after such "
            'a step, or choose CheckpointPolicy(staging="awaited")'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tensors,)


class StoreError(KeepstepError):
    """The place where checkpoints live refuses; checkpoints already there are untouched."""


class DirectoryNotOursError(StoreError, FileExistsError):
    """A target directory holds files that keepstep did not write; none of them is touched."""


class StoreBusyError(StoreError):
    """Another process is writing to this store."""


class CheckpointBusyError(StoreError):
    """A checkpoint that is to be deleted is being read, by another process or thread; nothing was changed."""


class StoreReadOnlyError(StoreError, PermissionError):
    """The store's directory cannot be written to."""


class BucketError(StoreError):
    """An object store can't be reached, times out, or refuses; what is there is whole."""


class NoThreadError(StoreError, RuntimeError):
    """The system starts no more threads, without which nothing is saved or loaded."""


class NoSpaceError(StoreError, OSError):
    """The disk is full; the unfinished checkpoint was removed and older ones are whole."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)  # an error may have to reach another process


class CheckpointNotFoundError(StoreError, FileNotFoundError):
    """There is no checkpoint of that name or at that path."""


class DamagedCheckpointError(KeepstepError):
    """What lies on disk is not what was committed.

    Attributes:
        path: the checkpoint's directory; a string if it lies elsewhere.
        overwritten: names of live objects' leaves that had already been overwritten when the
            damage was met; empty if nothing was changed. Load another checkpoint before you go on.
    """

    def __init__(self, path: object, message: str, *, overwritten: Sequence[str] = ()) -> None:
        self.path: Path | str = str(path) if "://" in str(path) else Path(str(path))
        self.message = message
        self.overwritten = tuple(overwritten)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), overwritten=self.overwritten), (self.path, self.message)

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}"
        if self.overwritten:
            shown = ", ".join(self.overwritten[:20])
            more = f" and {len(self.overwritten) - 20} more" if len(self.overwritten) > 20 else ""
            text += (
                f". Already overwritten with its contents: {shown}{more}. "
                "The live objects are in a mixed state: load another checkpoint into them before you go on"
            )
        return text


class ManifestError(DamagedCheckpointError):
    """manifest.json or state.json is missing, mangled or hostile."""


class SchemaVersionError(ManifestError):
    """The checkpoint was written by a newer keepstep."""


class MissingFileError(DamagedCheckpointError):
    """A file that the manifest names is not there."""


class FileSizeError(DamagedCheckpointError):
    """A file is shorter or longer than when it was committed."""


class DigestError(DamagedCheckpointError):
    """A digest differs from the one committed: bits flipped or bytes were replaced."""


class NoValidCheckpointError(KeepstepError):
    """There are checkpoints, and every one is damaged: to start over in silence would hide the loss."""


class MismatchError(KeepstepError, ValueError):
    """A sound checkpoint does not fit the live objects; nothing was changed.

    Attributes:
        missing: leaves that the live objects have and the checkpoint lacks.
        unexpected: leaves that the checkpoint has and the live objects lack.
        different: one sentence for each leaf of another shape, dtype or kind.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        different: Sequence[str] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.different = tuple(different)
        lines = [message]
        lines += [f"  missing from the checkpoint: {name}" for name in self.missing]
        lines += [f"  unexpected in the checkpoint: {name}" for name in self.unexpected]
        lines += [f"  different: {text}" for text in self.different]
        super().__init__("\n".join(lines))


class RestoreError(KeepstepError):
    """An object's own load_state_dict, or a codec, raised; the cause is chained."""


class ForeignTypeError(KeepstepError, TypeError):
    """A file of another library holds objects that could only be read by running code from it."""


class BackgroundSaveError(KeepstepError):
    """A save in the background failed; the cause is chained. Older checkpoints are whole."""


class StillSavingError(KeepstepError, TimeoutError):
    """A save in the background takes longer than it was waited for; it goes on."""


class NoBatchFitsError(KeepstepError, RuntimeError):
    """Memory runs out even with the smallest batch."""


class RankError(KeepstepError):
    """Something that all ranks do together came to nothing; committed checkpoints are whole."""


class RankMissingError(RankError):
    """Ranks did not come to something that all do together, within the time-out.

    Attributes:
        ranks: the ranks that were waited for.
        waited_s: how long, in seconds.
    """

    def __init__(self, message: str, *, ranks: Sequence[int], waited_s: float) -> None:
        self.ranks = tuple(ranks)
        self.waited_s = waited_s
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), ranks=self.ranks, waited_s=self.waited_s), (str(self),)


class RankFailedError(RankError):
    """Another rank raised, so what all do together was given up at once.

    Attributes:
        rank: the rank that raised; its own log has the traceback.
        kind: name of the class of what it raised; empty if that isn't known.
    """

    def __init__(self, message: str, *, rank: int, kind: str = "") -> None:
        self.rank = rank
        self.kind = kind
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), rank=self.rank, kind=self.kind), (str(self),)


class CollectiveMismatchError(RankError):
    """Ranks called different collectives at the same time, or the same one with tensors that don't match.

    Attributes:
        calls: what each rank called, by rank.
    """

    def __init__(self, message: str, *, calls: Sequence[str]) -> None:
        self.calls = tuple(calls)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), calls=self.calls), (str(self),)


class RanksDifferError(RankError, StateError):
    """Ranks hold states that are not of one model: other names, dtypes or shapes; nothing was written."""


class MirrorError(KeepstepError):
    """A checkpoint could not be copied to the mirror; it is whole where it was committed."""


class UsageError(KeepstepError, ValueError):
    """A call or a configuration that cannot work."""


class NotTensorError(UsageError, TypeError):
    """Something else was given where (dense) tensors are expected; the message names its place."""


class MissingPackageError(UsageError, ImportError):
    """Something optional was asked for, and the package that it needs is not installed."""


class NotPreparedError(UsageError):
    """An object has to go through `Accelerator.prepare()` first."""


class TuneError(KeepstepError):
    """Something of an experiment of many trials."""


class TrialError(TuneError):
    """A trial failed; the message names it, and holds its traceback."""


class ExperimentExistsError(TuneError, FileExistsError):
    """Another experiment has that name; nothing of it was touched."""


class ExperimentNotFoundError(TuneError, FileNotFoundError):
    """There is no experiment there."""


class NoResultError(TuneError, RuntimeError):
    """No trial, or no checkpoint of it, has the metric that was asked for."""


class ExperimentBusyError(TuneError):
    """Another process runs this experiment."""


class JournalError(TuneError):
    """An experiment's journal is damaged in the middle; a torn end is none."""
