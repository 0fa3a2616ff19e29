"""Files of `torch.save`: tensors and plain values, never code.

The files are pickles. torch's own restricted unpickler reads them, which makes tensors and containers and
refuses every other class; NumPy arrays, which are plain numbers too, are let through for those who need them.
"""

from __future__ import annotations

import os
import pickle
from _codecs import encode
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray

from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, ForeignTypeError

__all__ = ["read_torch_file"]

_ARRAYS: list[Any] = [
    multiarray._reconstruct,
    multiarray.scalar,
    np.ndarray,
    np.dtype,
    encode,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]
"""What arrays and scalars of NumPy's plain numbers are pickled as."""


def read_torch_file(path: str | os.PathLike[str], *, arrays: bool = False) -> Any:
    """What `torch.save` wrote, with tensors on the CPU, mapped from the file where it allows that.

    Args:
        path: the file.
        arrays: let NumPy arrays and numbers through too.

    Raises:
        CheckpointNotFoundError: there is no such file.
        ForeignTypeError: it holds objects of classes that would have to be run to be read.
        DamagedCheckpointError: it is cut off, or no file of torch's.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(f"there is no file {path}")
    mapped = torch.serialization._is_zipfile(path.open("rb"))
    try:
        with torch.serialization.safe_globals(_ARRAYS if arrays else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "weights_only" in str(error).lower():
            raise ForeignTypeError(
                f"{path} holds more than tensors and plain values, and reading it would run code from the "
                f"file: {_first_line(error)}. Save its state dict instead of the object, or convert it where "
                "you trust it"
            ) from error
        raise DamagedCheckpointError(path, f"it is no file of torch.save ({_first_line(error)})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(path, f"it is cut off or damaged ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    told = [line for line in lines if "Unsupported" in line or "GLOBAL" in line] or lines
    return told[0][:200] if told else type(error).__name__
