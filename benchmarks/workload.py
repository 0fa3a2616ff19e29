"""The states that are saved: a GPT-like model with its AdamW state, and many small tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from benchmarks.settings import Size

__all__ = ["TrainingState", "bytes_of", "small_tensors"]

_HEAD_WIDTH = 32


class TrainingState:
    """Model and optimizer after a step, without gradients.

    Attributes:
        model: fp32, on the CPU.
        optimizer: AdamW, with a state for every parameter.
    """

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        width = size.width
        layer = nn.TransformerEncoderLayer(width, width // _HEAD_WIDTH, 4 * width, batch_first=True)
        parts = {
            "tokens": nn.Embedding(size.vocabulary, width),
            "positions": nn.Embedding(min(1024, size.vocabulary), width),
            "blocks": nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False),
            "norm": nn.LayerNorm(width),
        }
        self.model: nn.Module = nn.ModuleDict(parts)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 + 0.01 * torch.rand(1))  # no two layers alike
                # Set, not stepped to: gradients would be a fourth copy, and leave holes in the heap.
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(1.0),
                    "exp_avg": parameter * 1e-3,
                    "exp_avg_sq": parameter * parameter,
                }
        self._slots = {key: dict(entry) for key, entry in self.optimizer.state.items()}

    @property
    def objects(self) -> dict[str, Any]:
        """What keepstep saves and loads into."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dicts(self) -> dict[str, Any]:
        """What `torch.save` saves."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[torch.Tensor]:
        """All live tensors of the state, detached."""
        slots = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [tensor.detach() for tensor in (*self.model.state_dict().values(), *slots)]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def digest(self) -> str:
        """Of every value; the same after a load that restored everything."""
        hasher = xxhash.xxh3_128()
        for tensor in self.tensors():
            hasher.update(bytes_of(tensor).data)
        return hasher.hexdigest()

    def advance(self) -> None:
        """Change every tensor a little, as a step does: what did not change would be linked, not written."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.view(-1)[:1] += 1

    def spoil(self) -> None:
        """Overwrite everything, so that a load which does nothing can't pass."""
        for tensor in self.tensors():
            tensor.zero_()

    def reseat(self) -> None:
        """Give the optimizer its own tensors back; a load_state_dict may have put mapped files there."""
        for parameter, entry in self._slots.items():
            self.optimizer.state[parameter] = dict(entry)


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The memory of a dense tensor."""
    array: np.ndarray[Any, np.dtype[np.uint8]] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


def small_tensors(count: int) -> dict[str, torch.Tensor]:
    """`count` tensors of 64 floats, each with memory of its own, named as in a deep module."""
    torch.manual_seed(0)
    values = torch.rand(count, 64)
    return {f"blocks.{index // 10}.part_{index % 10}.weight": values[index].clone() for index in range(count)}
