"""Dense tensors as the bytes that they are."""

from __future__ import annotations

import torch

__all__ = ["flat_bytes"]


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as a flat tensor of bytes, on its device.

    Torch calls a tensor of one element contiguous whatever its strides are, and refuses to see it as bytes.
    """
    flat = tensor.detach().reshape(-1)
    return (flat.as_strided((1,), (1,)) if flat.numel() == 1 else flat).view(torch.uint8)
