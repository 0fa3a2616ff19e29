"""The promise: interrupted after any micro-step and started again, a run ends in the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import runs
from tests.train.runs import Noisy, Tape, assert_exact, attempt, noisy_collate, outcome, plain_script
from torch.utils.data import DataLoader, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from keepstep import Accelerator, CheckpointPolicy
from keepstep.train.settings.config import GradientAccumulationPlugin, GradScalerKwargs

LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "drop_last": lambda: DataLoader(Noisy(), 4, shuffle=True, drop_last=True),
    "random collate": lambda: DataLoader(Noisy(), 4, shuffle=True, collate_fn=noisy_collate),
    "own generator": lambda: DataLoader(runs.OwnGenerator(), 4, shuffle=True),
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler([1.0] * 11 + [3.0] * 11, 18)),
    "subset": lambda: DataLoader(Noisy(), 4, sampler=SubsetRandomSampler(range(5, 20))),
    "global sampler": lambda: DataLoader(Noisy(), 4, sampler=runs.GlobalSampler(18)),
    "counting sampler": lambda: DataLoader(Noisy(), 4, sampler=runs.CountingSampler(18)),
    "epoch sampler": lambda: DataLoader(Noisy(), 4, sampler=runs.EpochSampler(18)),
    "keeping sampler": lambda: DataLoader(Noisy(), 4, sampler=runs.KeepingSampler(18)),
    "stateful sampler": lambda: DataLoader(Noisy(), 4, sampler=runs.StatefulSampler(18)),
    "unsized sampler": lambda: DataLoader(Noisy(), 4, sampler=runs.UnsizedSampler(18)),
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=runs.BucketBatches(18)),
    "wrapped batch sampler": lambda: DataLoader(Noisy(), batch_sampler=runs.batches_of(runs.shuffled(18))),
    "wrapped counting sampler": lambda: DataLoader(
        Noisy(), batch_sampler=runs.batches_of(runs.CountingSampler(18))
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_sampler(kind: str, tmp_path: Path) -> None:
    script = plain_script(LOADERS[kind])
    entries = assert_exact(script, tmp_path, stops=range(1, 10, 2))
    first, second = ([entry[1] for entry in entries if entry[0] == epoch] for epoch in (0, 1))
    assert (first == second) == (kind == "in order")


def test_samples_that_are_not_collated(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        loader = DataLoader(Noisy(6), batch_size=None, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        tape.resume()
        for _ in accelerator.epochs(2):
            for sample, index in loader:
                accelerator.backward(model(sample).sum())
                optimizer.step()
                optimizer.zero_grad()
                tape.note(index)
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("sync_with_dataloader", [True, False])
def test_inside_an_accumulation_window(precision: str, sync_with_dataloader: bool, tmp_path: Path) -> None:
    def make(project: Path) -> Accelerator:
        return Accelerator(
            cpu=True,
            project_dir=project,
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=3, sync_with_dataloader=sync_with_dataloader
            ),
            kwargs_handlers=[GradScalerKwargs(init_scale=2.0**14, growth_interval=2)],
        )

    script = plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True), clip=True)
    assert_exact(script, tmp_path, make=make)


def test_a_window_that_grows_during_the_run(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 1, shuffle=True))
        tape.resume()
        for _ in accelerator.epochs(1):
            for inputs, _ in loader:
                accelerator.gradient_accumulation_steps = 2 if accelerator.step < 3 else 4
                with accelerator.accumulate(model):
                    accelerator.backward(model(inputs).pow(2).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                tape.note(accelerator.sync_gradients, accelerator.step)
        return outcome(model, optimizer)

    def make(project: Path) -> Accelerator:
        return Accelerator(cpu=True, project_dir=project, gradient_accumulation_steps=2)

    entries = assert_exact(script, tmp_path, make=make, stops=iter([4, 6, 10]))
    complete = [number for number, (is_last, _) in enumerate(entries, 1) if is_last]
    assert complete == [2, 4, 6, 10, 14, 18, 22]


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_and_growth_of_the_loss_scale(fused: bool, tmp_path: Path) -> None:
    def make(project: Path) -> Accelerator:
        return Accelerator(
            cpu=True,
            project_dir=project,
            mixed_precision="fp16",
            kwargs_handlers=[GradScalerKwargs(init_scale=2.0**24, growth_interval=2)],
        )

    skipped = []

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        loader = DataLoader(Noisy(), 4, shuffle=True)
        loader, scheduler, optimizer, model = accelerator.prepare(loader, scheduler, optimizer, model)
        tape.resume()
        for _ in accelerator.epochs(2):
            for inputs, _ in loader:
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                skipped.append(accelerator.optimizer_step_was_skipped)
                tape.note(accelerator.optimizer_step_was_skipped, scheduler.get_last_lr(), accelerator.step)
        return outcome(model, optimizer)

    assert_exact(script, tmp_path, make=make)
    assert set(skipped) == {True, False}


def test_buffers_that_the_state_of_a_model_leaves_out(tmp_path: Path) -> None:
    class Drifting(torch.nn.Module):
        """Moves buffers in place or puts others in their place, with gradients off and in inference mode."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.register_buffer("moved", torch.zeros(4), persistent=False)
            self.register_buffer("replaced", torch.zeros(4), persistent=False)
            with torch.inference_mode():
                self.register_buffer("inferred", torch.zeros(4), persistent=False)
            self.register_buffer("cached", torch.zeros(4), persistent=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.moved.lerp_(inputs.mean(0), 0.1)
                self.replaced = 0.9 * self.replaced + 0.1 * inputs.mean(0)
            with torch.inference_mode():
                self.inferred.lerp_(inputs.mean(0), 0.2)
                self.cached = 0.8 * self.cached + 0.2 * inputs.mean(0)
            return self.layer(inputs - self.moved - self.replaced - self.inferred - self.cached)

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = torch.nn.Sequential(Drifting())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 4, shuffle=True))
        tape.resume()
        for _ in accelerator.epochs(1):
            for inputs, _ in loader:
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
                tape.note({name: value.tolist() for name, value in model.named_buffers()})
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


@pytest.mark.parametrize("staging", ["awaited", "overlapped"])
def test_sparse_gradients_that_no_step_has_used_yet(staging: Any, tmp_path: Path) -> None:
    def make(project: Path) -> Accelerator:
        policy = CheckpointPolicy(every_n_steps=1, staging=staging)
        return Accelerator(
            cpu=True, project_dir=project, gradient_accumulation_steps=2, checkpoint_policy=policy
        )

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        torch.manual_seed(5)
        model = torch.nn.Embedding(30, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 4, shuffle=True))
        tape.resume()
        for _ in accelerator.epochs(2):
            for _, indices in loader:
                with accelerator.accumulate(model):
                    optimizer.zero_grad()
                    accelerator.backward(model(indices).pow(2).sum())
                    optimizer.step()
                accelerator.checkpoint()
                tape.note(indices.tolist(), model.weight.grad.to_dense().tolist())
        return outcome(model, optimizer)

    assert_exact(script, tmp_path, make=make, stops=iter([1, 2, 9]))


def test_two_models_two_optimizers_and_an_average(tmp_path: Path) -> None:
    class Average:
        """An exponential moving average of the first model's weights."""

        def __init__(self, model: torch.nn.Module) -> None:
            self.shadow = {name: value.clone() for name, value in model.state_dict().items()}
            self.updates = 0

        def update(self, model: torch.nn.Module) -> None:
            self.updates += 1
            for name, value in model.state_dict().items():
                self.shadow[name].lerp_(value, 0.1)

        def state_dict(self) -> dict[str, Any]:
            return {"shadow": self.shadow, "updates": self.updates}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.shadow, self.updates = state["shadow"], state["updates"]

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        maker, critic = (
            torch.nn.Linear(4, 4),
            torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)),
        )
        for_maker = torch.optim.RMSprop(maker.parameters(), lr=1e-2)
        for_critic = torch.optim.Adam(critic.parameters(), lr=1e-2)
        schedulers = [
            torch.optim.lr_scheduler.MultiStepLR(for_maker, [2, 5]),
            torch.optim.lr_scheduler.LambdaLR(for_critic, lambda step: 1 / (1 + step)),
        ]
        average = Average(maker)
        accelerator.register_for_checkpointing(average)
        maker, critic, for_maker, for_critic, loader, *schedulers = accelerator.prepare(
            maker, critic, for_maker, for_critic, DataLoader(Noisy(), 4, shuffle=True), *schedulers
        )
        tape.resume()
        for _ in accelerator.epochs(2):
            for inputs, indices in loader:
                loss = critic(maker(inputs).detach()).mean() - critic(inputs).mean()
                accelerator.backward(loss)
                for_critic.step()
                for_critic.zero_grad()
                accelerator.backward(-critic(maker(inputs)).mean())
                for_maker.step()
                for_maker.zero_grad()
                for scheduler in schedulers:
                    scheduler.step()
                average.update(maker)
                tape.note(indices.tolist(), loss.item(), accelerator.step)
        return {
            "maker": outcome(maker, for_maker, for_critic),
            "critic": outcome(critic),
            "average": [average.shadow, average.updates],
        }

    assert_exact(script, tmp_path)


def test_every_scheduler_of_torch(tmp_path: Path) -> None:
    kinds = torch.optim.lr_scheduler

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedulers = [
            kinds.OneCycleLR(optimizer, 0.2, total_steps=40),
            kinds.SequentialLR(
                optimizer, [kinds.LinearLR(optimizer, 0.1), kinds.ExponentialLR(optimizer, 0.9)], [3]
            ),
            kinds.CosineAnnealingWarmRestarts(optimizer, 4),
            kinds.ReduceLROnPlateau(optimizer, patience=1),
            kinds.CyclicLR(optimizer, 0.01, 0.1),
        ]
        model, optimizer, loader, *schedulers = accelerator.prepare(
            model, optimizer, DataLoader(Noisy(12), 4), *schedulers
        )
        tape.resume()
        for _ in accelerator.epochs(2):
            for inputs, _ in loader:
                loss = model(inputs).pow(2).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                for number, scheduler in enumerate(schedulers):
                    scheduler.step(*([loss.item()] if number == 3 else []))
                tape.note(loss.item(), optimizer.param_groups[0]["lr"])
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_nested_evaluation_and_epilogue(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        train, held_out = DataLoader(Noisy(14), 4, shuffle=True), DataLoader(Noisy(6), 4, shuffle=True)
        model, optimizer, train, held_out, scheduler = accelerator.prepare(
            model, optimizer, train, held_out, scheduler
        )
        tape.resume()

        @torch.no_grad()
        def evaluate() -> float:
            return sum(float(model(inputs).sum()) for inputs, _ in held_out)

        for epoch in accelerator.epochs(2):
            for number, (inputs, indices) in enumerate(train):
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
                score = evaluate() if indices.sum() % 2 else None
                tape.note(epoch, indices.tolist(), score)
                assert number < 4
            scheduler.step()
            tape.note(epoch, evaluate())
        accelerator.end_training()
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_one_loader_after_the_other(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        first, second = DataLoader(Noisy(10), 4, shuffle=True), DataLoader(Noisy(7), 2, shuffle=True)
        model, optimizer, first, second = accelerator.prepare(model, optimizer, first, second)
        tape.resume()
        for epoch in accelerator.epochs(2):
            for name, loader in (("first", first), ("second", second), ("again", first)):
                for inputs, indices in loader:
                    accelerator.backward(model(inputs).pow(2).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                    tape.note(epoch, indices.tolist() if name != "again" else sorted(indices.tolist()))
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_two_loaders_side_by_side(tmp_path: Path, with_gradients: bool) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        labelled, unlabelled = DataLoader(Noisy(14), 4, shuffle=True), DataLoader(Noisy(9), 4, shuffle=True)
        model, optimizer, labelled, unlabelled = accelerator.prepare(model, optimizer, labelled, unlabelled)
        tape.resume()
        more = iter(unlabelled)
        for epoch in accelerator.epochs(3):
            for inputs, indices in labelled:
                with torch.set_grad_enabled(with_gradients):
                    try:
                        others, other_indices = next(more)
                    except StopIteration:
                        more = iter(unlabelled)
                        others, other_indices = next(more)
                loss = model(inputs).pow(2).mean() + model(others).abs().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                tape.note(epoch, indices.tolist(), other_indices.tolist(), loss.item())
            tape.note("epilogue", epoch)
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_zip_of_two_loaders(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        one, two = DataLoader(Noisy(10), 4, shuffle=True), DataLoader(Noisy(18), 4, shuffle=True)
        model, optimizer, one, two = accelerator.prepare(model, optimizer, one, two)
        tape.resume()
        for epoch in accelerator.epochs(2):
            for (inputs, indices), (others, other_indices) in zip(one, two, strict=False):
                accelerator.backward((model(inputs).mean() - model(others).mean()) ** 2)
                optimizer.step()
                optimizer.zero_grad()
                tape.note(epoch, indices.tolist(), other_indices.tolist())
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_a_pass_that_is_left_early(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 4, shuffle=True))
        tape.resume()
        for epoch in accelerator.epochs(3):
            for inputs, indices in loader:
                if accelerator.step == 3 * (epoch + 1):
                    break
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
                tape.note(epoch, indices.tolist())
            tape.note("epilogue", epoch)
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_steps_counted_over_endless_passes(tmp_path: Path) -> None:
    """No epochs(): a loop of its own that asks for the next batch."""

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 4, shuffle=True))
        tape.resume()
        while accelerator.step < 14:
            for inputs, indices in loader:
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
                tape.note(accelerator.step, indices.tolist())
                if accelerator.step == 14:
                    break
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_two_epoch_loops(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = runs.small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(Noisy(10), 4, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        tape.resume()
        for phase, count in (("warm-up", 1), ("main", 2)):
            for epoch in accelerator.epochs(count):
                for inputs, indices in loader:
                    accelerator.backward(model(inputs).pow(2).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                    tape.note(phase, epoch, indices.tolist())
        return outcome(model, optimizer)

    assert_exact(script, tmp_path)


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    script = plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True), epochs=2)
    whole, entries = attempt(script, tmp_path / "whole")
    seen: list[Any] = []
    result = None
    while result is None:
        result, part = attempt(script, tmp_path / "broken", 1 if len(seen) < len(entries) else None)
        seen += part
    assert seen == entries
    runs.assert_same(result, whole)


def test_saving_again_before_anything_was_iterated(tmp_path: Path) -> None:
    script = plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True))
    whole, entries = attempt(script, tmp_path / "whole")
    for stop in (4, 6):
        project = tmp_path / f"stopped_{stop}"
        _, before = attempt(script, project, stop)

        def save_only(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
            def leave(*_: Any) -> None:
                accelerator.save_state()
                raise runs.Interrupted

            accelerator.epochs = leave  # type: ignore[method-assign,assignment]
            return script(accelerator, tape)

        assert attempt(save_only, project) == (None, [])
        result, after = attempt(script, project)
        assert before + after == entries
        runs.assert_same(result, whole)


def test_the_order_needs_no_history() -> None:
    """A later pass can be drawn without the earlier ones: set_epoch says which."""
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Noisy(), 4, shuffle=True))
    third = [indices.tolist() for _ in range(3) for _, indices in loader][-6:]
    torch.manual_seed(0)
    again = Accelerator(cpu=True).prepare(DataLoader(Noisy(), 4, shuffle=True))
    again.set_epoch(2)
    assert [indices.tolist() for _, indices in again] == third


def test_sequential_order_is_kept() -> None:
    loader = Accelerator(cpu=True).prepare(DataLoader(Noisy(9), 4, sampler=SequentialSampler(range(9))))
    assert [indices.tolist() for _, indices in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
