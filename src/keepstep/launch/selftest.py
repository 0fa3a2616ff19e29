"""What `keepstep test` runs on every process: does this set-up train right? Each check says what it found.

It can be started by hand as well: `keepstep launch ... -m keepstep.launch.selftest`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, TensorDataset

from keepstep.train.accelerator import Accelerator
from keepstep.train.ranks.operations import broadcast_object_list, gather_object
from keepstep.train.ranks.seeding import set_seed, synchronize_rng_states

__all__ = ["main"]

_PER_RANK: Final = 4
_STEPS: Final = 6
_CLOSE: Final = 1e-4


class SelfTestError(Exception):
    """The set-up does something wrong; the message says what was expected."""


def main() -> None:
    """Run all checks; any that fails ends the process with its traceback."""
    accelerator = Accelerator()
    if accelerator.is_main_process:
        sys.stdout.write(f"{accelerator.state!r}")
    for words, check in (
        ("every rank is there once", _ranks),
        ("ranks wait for each other and share work", _control),
        ("random numbers can be made the same on all ranks", _random_numbers),
        ("tensors are gathered, reduced and padded", _collectives),
        ("every sample is seen once, by one rank", _loaders),
        ("training gives the weights that one process gives", _parity),
        ("a saved run goes on in the same bytes", _resuming),
    ):
        check(accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sys.stdout.write(f"ok  {words}\n")
            sys.stdout.flush()
    accelerator.end_training()
    if accelerator.is_main_process:
        sys.stdout.write("All is well: this set-up is ready to train.\n")


def _expect(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise SelfTestError(f"{what}: found {found!r}, expected {expected!r}")


def _ranks(accelerator: Accelerator) -> None:
    ranks = gather_object([accelerator.process_index])
    _expect(sorted(ranks), list(range(accelerator.num_processes)), "the ranks")
    _expect(accelerator.is_main_process, accelerator.process_index == 0, "who is the main process")
    total = accelerator.reduce(torch.ones(1, device=accelerator.device))
    _expect(float(total), float(accelerator.num_processes), "a sum of ones over the ranks")


def _control(accelerator: Accelerator) -> None:
    calls: list[int] = []
    accelerator.on_main_process(lambda: calls.append(1))()
    _expect(len(calls), int(accelerator.is_main_process), "calls of on_main_process")
    with accelerator.main_process_first():
        pass
    items = list(range(2 * accelerator.num_processes + 1))
    with accelerator.split_between_processes(items) as mine:
        shares = gather_object(list(mine))
    _expect(sorted(shares), items, "what split_between_processes hands out")


def _random_numbers(accelerator: Accelerator) -> None:
    set_seed(accelerator.process_index)
    synchronize_rng_states(["torch"])
    drawn = gather_object([torch.rand(1).item()])
    _expect(len(set(drawn)), 1, "different numbers drawn after synchronize_rng_states")


def _collectives(accelerator: Accelerator) -> None:
    rank, size = accelerator.process_index, accelerator.num_processes
    rows = torch.full((2, 3), float(rank), device=accelerator.device)
    gathered = accelerator.gather(rows)
    _expect(gathered[:, 0].tolist(), [float(r) for r in range(size) for _ in range(2)], "gathered rows")
    ragged = torch.ones(rank + 1, device=accelerator.device)
    _expect(len(accelerator.pad_across_processes(ragged)), size, "the length of padded tensors")


def _loaders(accelerator: Accelerator) -> None:
    count = 4 * _PER_RANK * accelerator.num_processes
    for shuffle in (False, True):
        set_seed(7)
        data = DataLoader(TensorDataset(torch.arange(count)), batch_size=_PER_RANK, shuffle=shuffle)
        loader = Accelerator.prepare(accelerator, data)
        seen = gather_object([int(sample) for (batch,) in loader for sample in batch])
        _expect(sorted(seen), list(range(count)), f"samples seen with shuffle={shuffle}")


def _parity(accelerator: Accelerator) -> None:
    if accelerator.mixed_precision != "no":
        accelerator.print("    (compared loosely: mixed precision rounds)")
    alone = _train_alone(accelerator.num_processes)
    together = _Run(accelerator)
    together.steps(_STEPS)
    allowed = _CLOSE if accelerator.mixed_precision == "no" else 0.1
    for name, expected in alone.items():
        difference = float((together.weights()[name].cpu() - expected).abs().max())
        if not difference <= allowed:
            raise SelfTestError(
                f"{name} is {difference:.2g} off the weights of one process; allowed: {allowed}"
            )


def _resuming(accelerator: Accelerator) -> None:
    directory = [tempfile.mkdtemp(prefix="keepstep-test-") if accelerator.is_main_process else ""]
    place = Path(broadcast_object_list(directory)[0])
    reachable = all(gather_object([place.is_dir()]))
    try:
        if not reachable:
            accelerator.print("    (saving was not tried: machines share no temporary directory)")
            return
        whole = _Run(accelerator)
        whole.steps(_STEPS // 2)
        whole.accelerator.save_state(str(place / "halfway"))
        whole.steps(_STEPS)
        again = _Run(accelerator)
        again.accelerator.load_state(str(place / "halfway"))
        again.steps(_STEPS)
        for name, expected in whole.weights().items():
            if not torch.equal(again.weights()[name], expected):
                raise SelfTestError(f"{name} of the resumed run differs from the run that was not stopped")
    finally:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(directory[0], ignore_errors=True)


# ------------------------------------------------------------------------------------- a small run


def _data(ranks: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_STEPS * _PER_RANK * ranks, 8, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def _model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


_loss: Final[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = torch.nn.functional.mse_loss


def _train_alone(ranks: int) -> dict[str, torch.Tensor]:
    """Plain PyTorch in one process, with batches as large as those of all ranks together."""
    model = _model()
    optimizer = _optimizer(model)
    for inputs, targets in DataLoader(_data(ranks), batch_size=_PER_RANK * ranks):
        _loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


class _Run:
    """A model, an optimizer and a loader on all ranks."""

    def __init__(self, like: Accelerator) -> None:
        self.accelerator = Accelerator(cpu=like.device.type == "cpu", mixed_precision=like.mixed_precision)
        model = _model()
        loader = DataLoader(_data(like.num_processes), batch_size=_PER_RANK)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, _optimizer(model), loader)

    def steps(self, until: int) -> None:
        """Train on until so many steps are done."""
        for inputs, targets in self.loader:
            with self.accelerator.autocast():
                loss = _loss(self.model(inputs), targets)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.step >= until:
                break

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights, whole on every rank."""
        state: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
        return state


if __name__ == "__main__":
    main()
