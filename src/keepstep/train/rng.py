"""Random number generators: capture and restore them all, or isolate a piece of code from them.

The global generators are Python's `random`, NumPy's legacy functions, torch on the CPU, and torch on each
accelerator. `capture` and `restore` handle all of them. The isolating parts handle the first three,
since data is loaded on the CPU.

NumPy's global state takes 40 microseconds to read and as much to write. Swapping its bit generator takes
a fraction of one, but drops the second value of a pair of Gaussians, if one is held back. So that this never
depends on where data is loaded, `drop_held_gaussian` does the same for batches that workers load.

Python's takes 8 to read and 3 to write, as a tuple of 625 integers. CPython keeps them in one piece of memory
behind the object's head, which is copied in a tenth of one; where that can't be seen to be so, tuples do.
"""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import torch

__all__ = [
    "PausedRandomness",
    "begin",
    "capture",
    "differing",
    "drop_held_gaussian",
    "isolated",
    "restore",
    "seed_globals",
]

_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_torch_generator: torch.Generator = torch.default_generator


def _numpy() -> Any:
    """NumPy if this process has imported it: what was never imported has drawn nothing."""
    return sys.modules.get("numpy")


def capture() -> dict[str, Any]:
    """Return the state of every global generator as plain values and tensors."""
    version, words, gauss = random.getstate()
    tree: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "torch": _torch_generator.get_state(),
    }
    numpy = _numpy()
    if numpy is not None:
        tree["numpy"] = numpy.random.get_state(legacy=False)
    device_states = _device_states()
    if device_states:
        tree["accelerator"] = device_states
        tree["device"] = _device_index()
    return tree


def restore(tree: dict[str, Any]) -> None:
    """Put every global generator back to a captured state.

    The device that this process trains on gets the state of the one that it trained on, whatever the numbers
    of the two: they change with the number of machines and with what a process is let see. Other devices get
    their own back where that number is the same; those that this machine lacks have none to restore.
    """
    python = tree["python"]
    random.setstate((int(python["version"]), tuple(python["words"].tolist()), python["gauss"]))
    numpy = _numpy()
    if numpy is not None and "numpy" in tree:
        numpy.random.set_state(tree["numpy"])
    _set_device_states(tree.get("accelerator", []), tree.get("device"))
    _torch_generator.set_state(tree["torch"])


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Which generators are in other states, of two captures in one process: "torch", "python" ..."""
    return [name for name in sorted(one.keys() & other.keys()) if not _are_equal(one[name], other[name])]


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_are_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    if hasattr(one, "tolist"):  # of torch, or of NumPy
        return bool(one.tolist() == other.tolist())
    return bool(one == other)


def begin(seed: int) -> None:
    """Seed every global generator."""
    seed_globals(seed)
    module = _device_module()
    if module is not None and hasattr(module, "manual_seed_all"):
        module.manual_seed_all(seed)


def _device_module() -> Any:
    """The torch module of this machine's kind of accelerator (`torch.cuda` ...), None without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else torch.get_device_module(device)


def _device_states() -> list[torch.Tensor]:
    module = _device_module()
    # A device that was never used has drawn nothing, and asking would take memory on it.
    if module is None or not getattr(module, "is_initialized", lambda: True)():
        return []
    if hasattr(module, "get_rng_state_all"):
        return list(module.get_rng_state_all())
    return [module.get_rng_state()]


def _device_index() -> int:
    """Number of the device that this process computes on, among those it sees."""
    return int(getattr(_device_module(), "current_device", lambda: 0)())


def _set_device_states(states: list[torch.Tensor], index: int | None) -> None:
    """Restore devices.

    Args:
        states: of each that was seen.
        index: which of them was the process's own; None if that is not known.
    """
    module = _device_module()
    if module is None or not states:
        return
    if not hasattr(module, "set_rng_state_all"):
        module.set_rng_state(states[0])
    elif index is None or index == _device_index():
        module.set_rng_state_all(states[: module.device_count()])
    else:
        module.set_rng_state(states[index])


def seed_globals(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators. Much faster than `torch.manual_seed`."""
    _torch_generator.manual_seed(seed & _MASK_64)
    if _python_memory is None:
        random.seed(seed)
    else:  # what `random.seed` comes to for an integer, without its look at the type
        _seed_python(seed)
        _python_generator.gauss_next = None
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed & _MASK_32)


_spare_bit_generators: list[Any] = []

_WORDS = 625
"""Of 32 bits: how many have been used, and the 624 of a Mersenne Twister."""


def memory_of(generator: Any) -> memoryview | None:
    """Where a generator of Python's keeps its state, as long as it lives; None if it can't be told."""
    if type(generator) is not random.Random or sys.implementation.name != "cpython":
        return None
    if random.Random.__basicsize__ < object.__basicsize__ + 4 * _WORDS:
        return None
    words = (ctypes.c_uint32 * _WORDS).from_address(id(generator) + object.__basicsize__)
    used, *state = words
    if (*state, used) != generator.getstate()[1]:
        return None
    return memoryview(words).cast("B")


_python_generator: Any = getattr(random, "_inst", None)
_python_memory = memory_of(_python_generator)
_seed_python: Any = getattr(super(random.Random, _python_generator), "seed", None)


def _python_state() -> Any:
    """The state of Python's generator, to be handed to `_set_python_state`."""
    if _python_memory is None:
        return random.getstate()
    return _python_memory.tobytes(), _python_generator.gauss_next


def _set_python_state(state: Any) -> None:
    if _python_memory is None:
        random.setstate(state)
    else:
        _python_memory[:], _python_generator.gauss_next = state


class isolated:  # noqa: N801 (used as a context)
    """Run a block with the global CPU generators seeded, and put them back however it ends.

    Written as a class since it is entered for every batch: `contextmanager` would add a tenth to its cost.

    Args:
        seed: at which the block's generators start.
    """

    __slots__ = ("_bit_generator", "_python", "_seed", "_spare", "_torch")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._torch = _torch_generator.get_state()
        self._python = _python_state()
        numpy = _numpy()
        self._bit_generator = None
        if numpy is not None:
            # One spare for each level of nesting: making one costs 100 microseconds.
            self._spare = _spare_bit_generators.pop() if _spare_bit_generators else numpy.random.MT19937(0)
            self._bit_generator = numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(self._spare)
        seed_globals(self._seed)

    def __exit__(self, *failure: object) -> None:
        if self._bit_generator is not None:
            sys.modules["numpy"].random.set_bit_generator(self._bit_generator)
            _spare_bit_generators.append(self._spare)
        _set_python_state(self._python)
        _torch_generator.set_state(self._torch)


def drop_held_gaussian() -> None:
    """Do to NumPy's global state what `isolated` does to it; see the module's first lines."""
    numpy = _numpy()
    if numpy is not None:
        numpy.random.set_bit_generator(numpy.random.get_bit_generator())


class PausedRandomness:
    """Generators of its own that a piece of code uses whenever it is let run, and only then.

    Enter it around each step of an iteration that is spread over time: the steps draw from one unbroken
    stream, and the surrounding code never notices.

    Args:
        seed: where the stream starts.
    """

    def __init__(self, seed: int) -> None:
        with isolated(seed):
            self._mine = _cpu_states()

    def __enter__(self) -> None:
        self._outer = _cpu_states()
        _set_cpu_states(self._mine)

    def __exit__(self, *failure: object) -> None:
        self._mine = _cpu_states()
        _set_cpu_states(self._outer)


def _cpu_states() -> tuple[Any, Any, Any]:
    numpy = _numpy()
    return _torch_generator.get_state(), _python_state(), numpy and numpy.random.get_state(legacy=False)


def _set_cpu_states(states: tuple[Any, Any, Any]) -> None:
    torch_state, python_state, numpy_state = states
    _torch_generator.set_state(torch_state)
    _set_python_state(python_state)
    numpy = _numpy()
    if numpy is not None and numpy_state is not None:
        numpy.random.set_state(numpy_state)
