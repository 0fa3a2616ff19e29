"""A training script that is really killed, again and again, and started again with the same command."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.forked import run_program, start_program

SCRIPT = """
import hashlib, random, sys, time
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(1)
from keepstep import Accelerator, CheckpointPolicy

project, nap_s = sys.argv[1], float(sys.argv[2])
torch.manual_seed(3)


class Noisy(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((8,), index / 30.0) + torch.rand(8) + random.random() + float(np.random.rand())


accelerator = Accelerator(
    cpu=True,
    project_dir=project,
    gradient_accumulation_steps=2,
    checkpoint_policy=CheckpointPolicy(every_n_steps=1, keep_last=2),
)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
loader = DataLoader(Noisy(), 4, shuffle=True, num_workers=int(sys.argv[3]))
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
accelerator.resume()
for epoch in accelerator.epochs(5):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        time.sleep(nap_s)
        accelerator.checkpoint(metrics={"loss": loss.item()})
        print("step", accelerator.step, flush=True)
accelerator.end_training()
digest = hashlib.sha256()
for tensor in [*model.state_dict().values(), *(s["exp_avg"] for s in optimizer.state.values())]:
    digest.update(tensor.detach().numpy().tobytes())
digest.update(torch.rand(3).numpy().tobytes())
print("digest", digest.hexdigest(), flush=True)
"""


def killed_after(steps: int, script: Path, *arguments: object) -> None:
    """Start, wait for that many reported steps, then SIGKILL the whole process group."""
    process = start_program(script, *arguments, start_new_session=True)
    for _ in range(steps):
        assert process.stdout.readline().startswith("step")
    time.sleep(0.002 * steps)
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL


def test_killed_and_started_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    twin = start_program(script, tmp_path / "twin", 0, 0)
    killed_after(4, script, tmp_path / "killed", 0.01, 0)
    killed_after(7, script, tmp_path / "killed", 0.002, 1)
    last = run_program(script, tmp_path / "killed", 0, 0)
    assert last.returncode == 0, last.stdout
    expected, _ = twin.communicate()
    assert twin.returncode == 0
    digest = expected.splitlines()[-1]
    assert digest.startswith("digest")
    assert last.stdout.splitlines()[-1] == digest
    # It did go on: neither the first step nor many others were run again.
    assert len(last.stdout.splitlines()) < len(expected.splitlines()) - 5
