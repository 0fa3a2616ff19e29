from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.runs import Noisy, assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from keepstep import Accelerator
from keepstep.errors import UsageError
from keepstep.train.precision import Float16
from keepstep.train.settings.config import GradientAccumulationPlugin, GradScalerKwargs


def test_what_prepare_returns() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = DataLoader(Noisy(8), 4)
    first = accelerator.prepare(scheduler, "text", loader, optimizer, model)
    assert first[1] == "text"
    assert first[4] is model
    assert accelerator.prepare(scheduler, "text", loader, optimizer, model) == first
    assert accelerator.prepare(*first) == first
    assert accelerator.prepare(model) is model
    assert isinstance(first[3], torch.optim.Optimizer)
    assert first[0].optimizers == [first[3]]


def test_a_scheduler_made_from_a_prepared_optimizer() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 1)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    model(torch.ones(4)).backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert scheduler.get_last_lr() == [0.05]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_equal_to_plain_torch(accumulation: int) -> None:
    """The facade adds nothing to the arithmetic."""

    def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(2)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    batches = [torch.randn(5, 4) for _ in range(9)]
    plain, optimizer = model_and_optimizer()
    for number, batch in enumerate(batches, start=1):
        loss = plain(batch).pow(2).mean()
        (loss / accumulation).backward()
        if number % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
            optimizer.step()
            optimizer.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, prepared = accelerator.prepare(*model_and_optimizer())
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).pow(2).mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.7)
            prepared.step()
            prepared.zero_grad()
    assert_same(dict(model.state_dict()), dict(plain.state_dict()))
    assert accelerator.step == 9 // accumulation


def test_the_window_closes_at_the_last_batch() -> None:
    for sync, expected in ((True, [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]), (False, [0, 0, 1, 0, 0, 1, 0, 0, 1, 0])):
        plugin = GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=sync)
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        loader = accelerator.prepare(DataLoader(Noisy(20), 4))
        seen = []
        for _ in range(2):
            for _ in loader:
                with accelerator.accumulate():
                    seen.append(int(accelerator.sync_gradients))
        assert seen == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_runs_low_and_returns_float32(precision: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor) -> dict[str, Any]:
            output = self.layer(inputs)
            seen.append(output.dtype)
            return {"logits": output, "extra": [output, (output, 3)]}

    model = accelerator.prepare(Spy())
    output = model(torch.ones(2, 4))
    assert output["logits"].dtype == output["extra"][1][0].dtype == torch.float32
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    with accelerator.autocast():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == seen[0]
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert bare(torch.ones(2, 4))["logits"].dtype == torch.float32
    assert seen[-1] == torch.float32


def fp16_pair(init_scale: float) -> tuple[Accelerator, torch.nn.Module, Any, Any]:
    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=init_scale)]
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    one, two = accelerator.prepare(
        torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    )
    return accelerator, accelerator.prepare(model), one, two


def test_two_optimizers_share_one_scaled_backward() -> None:
    """Adjusting the scale after the first would leave the second one's gradients at the wrong size."""
    accelerator, model, one, two = fp16_pair(2.0**40)
    inputs = torch.ones(3, 4)
    accelerator.backward(model(inputs).sum())
    one.step()
    two.step()
    assert one.step_was_skipped
    assert two.step_was_skipped
    assert accelerator.optimizer_step_was_skipped
    assert accelerator.step == 0
    accelerator, model, one, two = fp16_pair(4.0)
    accelerator.backward(model(inputs).sum())
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
    assert norm is not None
    assert torch.allclose(norm, torch.tensor(float((8 * 9 + 2 * 9) ** 0.5)))
    accelerator.clip_grad_value_(model.parameters(), 2.0)
    before = model.bias.detach().clone()
    one.step()
    two.step()
    assert torch.allclose(model.bias, before - 0.2)


def test_the_device_is_not_waited_for_after_a_scaled_step() -> None:
    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    accelerator, model, one, _ = fp16_pair(4.0)
    accelerator.backward(model(torch.ones(3, 4)).sum())
    with Operations() as seen:
        one.step()
    assert not one.step_was_skipped
    waits = [at for at, name in enumerate(seen.names) if name == "_local_scalar_dense"]
    steps = [at for at, name in enumerate(seen.names) if name in {"add_", "_foreach_add_"}]
    assert max(waits) < min(steps), seen.names


def test_saving_between_clipping_and_stepping_is_refused(tmp_path: Any) -> None:
    accelerator, model, one, _ = fp16_pair(4.0)
    accelerator.backward(model(torch.ones(3, 4)).sum())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(UsageError, match=r"after optimizer\.step\(\)"):
        accelerator.save_state(tmp_path / "here")
    with pytest.raises(UsageError, match="closure"):
        one.step(lambda: None)


@pytest.mark.parametrize("after", ["nothing", "a step", "the same step", "going back"])
def test_training_goes_on_after_a_step_that_was_interrupted(
    after: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model, one, two = fp16_pair(4.0)
    accelerator.save_state(tmp_path / "before")

    def backward() -> None:
        one.zero_grad()
        two.zero_grad()
        accelerator.backward(model(torch.ones(3, 4)).sum())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    backward()
    with monkeypatch.context() as patched:
        patched.setattr(Float16, "_overflowed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.step()
    accelerator.save_state(tmp_path / "here")
    if after == "nothing":
        return
    if after == "going back":
        accelerator.load_state(tmp_path / "before")
    if after != "the same step":
        backward()
    before = model.weight.detach().clone()
    one.step()
    two.step()
    assert torch.allclose(model.weight, before - 0.3), "gradients are 3"
    backward()
    one.step()
    two.step()
    assert torch.allclose(model.weight, before - 0.6)


def test_closures_and_group_changes_reach_the_optimizer() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    optimizer = accelerator.prepare(torch.optim.LBFGS([model.weight], lr=0.1, max_iter=2))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).pow(2).sum()
        accelerator.backward(loss)
        return loss

    assert optimizer.step(closure) is not None
    assert accelerator.step == 1
    other = accelerator.prepare(torch.optim.SGD([model.weight], lr=0.1))
    other.add_param_group({"params": [model.bias]})
    assert len(other.optimizer.param_groups) == len(other.param_groups) == 2
    other.load_state_dict(other.state_dict())
    assert "SGD" in repr(other)
    assert other.defaults["lr"] == 0.1
    with pytest.raises(AttributeError, match="no_such"):
        _ = other.no_such


def test_registering_refuses_what_cannot_be_saved() -> None:
    class Half:
        def state_dict(self) -> dict[str, Any]:
            return {}

    accelerator = Accelerator(cpu=True)
    with pytest.raises(UsageError) as caught:
        accelerator.register_for_checkpointing(torch.nn.Linear(1, 1), Half(), 7)
    assert "argument 1 (Half) lacks load_state_dict()" in str(caught.value)
    assert "argument 2 (int) lacks state_dict() and load_state_dict()" in str(caught.value)
    assert accelerator._state.registered == []


def test_one_process_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.print("once")
    assert capsys.readouterr().out == "once\n"
    accelerator.wait_for_everyone()
    assert accelerator.is_main_process
    assert accelerator.is_local_main_process
    assert accelerator.is_last_process
    assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (
        1,
        0,
        0,
    )
    assert accelerator.distributed_type == "NO"
    batch = torch.ones(2)
    assert accelerator.gather(batch) is accelerator.gather_for_metrics(batch) is batch
    assert accelerator.reduce(batch, "mean").tolist() == [1, 1]
    with accelerator.main_process_first(), accelerator.no_sync(torch.nn.Linear(1, 1)):
        assert accelerator.on_main_process(lambda: 3)() == 3


def test_letting_go() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    (model,) = accelerator.free_memory(model)
    assert model is None
    assert accelerator._state.is_empty


def test_compiled_models_are_saved_without_their_wrapper() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    compiled = accelerator.prepare(torch.compile(model))
    assert accelerator.unwrap_model(compiled) is model
    assert accelerator._state.models == [model]


def test_what_another_accelerator_prepared_is_prepared_anew() -> None:
    """As in a notebook whose cell runs twice."""
    made = parts_of_a_run()
    first = Accelerator(cpu=True).prepare(*made)
    second = Accelerator(cpu=True)
    model, optimizer, scheduler, loader = second.prepare(*first)
    assert (optimizer.optimizer, scheduler.scheduler, loader.prepared_from) == made[1:]
    for batch in loader:
        second.backward(model(batch).sum())
        optimizer.step()
        scheduler.step()
    assert (second.step, scheduler.last_epoch) == (2, 2)
    assert second.prepare(model, optimizer) == (model, optimizer)


def parts_of_a_run() -> tuple[Any, ...]:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return model, optimizer, scheduler, torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)


def test_only_what_a_method_prepares_is_taken() -> None:
    accelerator = Accelerator(cpu=True)
    for method in ("prepare_model", "prepare_optimizer", "prepare_data_loader", "prepare_scheduler"):
        with pytest.raises(UsageError, match=rf"{method}\(\) was given a int; it takes an? "):
            getattr(accelerator, method)(3)
