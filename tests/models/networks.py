"""Models for the tests: blocks in blocks, tied weights, buffers, keyword arguments."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gain = nn.Parameter(torch.full((width,), 0.5))
        self.register_buffer("shift", torch.arange(width) / width)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.inner(x) * self.gain + self.shift + x
        return y if scale is None else y * scale


class Network(nn.Module):
    """Tied embedding and head, blocks with parameters of their own, persistent and other buffers."""

    def __init__(self, width: int = 8, blocks: int = 3, vocabulary: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(width) - width / 2, persistent=False)

    def forward(self, tokens: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, scale=scale)
        return {"logits": self.head(self.norm(x))}


def network(seed: int = 0, **sizes: int) -> Network:
    torch.manual_seed(seed)
    return Network(**sizes).eval()


TOKENS = torch.arange(12).reshape(2, 6)
SCALE = torch.tensor(1.25)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS, scale=SCALE)["logits"]
