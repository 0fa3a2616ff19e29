from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.holding import at_call
from tests.train.failing import fail_once
from tests.train.runs import Noisy, assert_same
from torch.utils.data import DataLoader

from keepstep import Accelerator, Checkpoint, CheckpointPolicy, PendingSave, ProjectConfiguration, Store
from keepstep.errors import (
    BackgroundSaveError,
    CheckpointNotFoundError,
    MismatchError,
    NotPreparedError,
    NoValidCheckpointError,
    StoreReadOnlyError,
    UnsupportedTypeError,
    UsageError,
)


class Counter:
    """The smallest thing that can be registered."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Run:
    """A small prepared run."""

    def __init__(
        self, project: Path | None, *, batch_size: int = 4, length: int = 20, **options: Any
    ) -> None:
        torch.manual_seed(1)
        self.accelerator = Accelerator(cpu=True, project_dir=project, **options)
        self.plain = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(self.plain.parameters(), lr=0.1)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.plain, optimizer, DataLoader(Noisy(length), batch_size, shuffle=True)
        )

    def step(self) -> None:
        self.accelerator.backward(self.model(torch.ones(2, 4)).pow(2).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.plain.state_dict().items()}


def names(project: Path) -> list[str]:
    return [checkpoint.name for checkpoint in Store(project / "checkpoints").list()]


def test_explicit_directories(tmp_path: Path) -> None:
    run = Run(None)
    run.step()
    (tmp_path / "here").mkdir()
    saved = run.accelerator.save_state(tmp_path / "here", metrics={"loss": 0.5}, tags=("good",))
    assert saved == str(tmp_path / "here")
    weights = run.weights()
    run.step()
    loaded = run.accelerator.load_state(saved)
    assert (loaded.step, loaded.metrics["loss"], loaded.tags) == (1, 0.5, ("good",))
    assert_same(run.weights(), weights)
    assert run.accelerator.step == 1
    assert sorted(Checkpoint.open(saved).load()) == ["model", "optimizer", "train"]


def test_automatic_names_go_on_after_a_resume(tmp_path: Path) -> None:
    run = Run(
        None, project_config=ProjectConfiguration(project_dir=tmp_path, automatic_checkpoint_naming=True)
    )
    assert run.accelerator.save_state("ignored") == str(tmp_path / "checkpoints" / "checkpoint_0")
    again = Run(tmp_path)
    assert again.accelerator.load_state().name == "checkpoint_0"
    assert again.accelerator.save_iteration == 1
    assert again.accelerator.save_state() == str(tmp_path / "checkpoints" / "checkpoint_1")


def test_what_was_saved_by_hand_stays_unless_a_limit_is_given(tmp_path: Path) -> None:
    run = Run(tmp_path / "free")
    for _ in range(5):
        run.accelerator.save_state()
    hours = itertools.count(step=3600.0)
    run.accelerator._saver._pacer.clock = lambda: next(hours)
    for _ in range(5):
        run.step()
        while (pending := run.accelerator.checkpoint()) is None:
            pass  # an hour later by the clock
        pending.wait()
    assert names(tmp_path / "free") == [f"checkpoint_{number}" for number in (0, 1, 2, 3, 4, 7, 8, 9)]
    limited = Run(tmp_path / "limited", project_config=ProjectConfiguration(total_limit=2))
    for _ in range(5):
        limited.accelerator.save_state()
    assert names(tmp_path / "limited") == ["checkpoint_3", "checkpoint_4"]


def test_a_policy_by_steps_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_n_steps=2, keep_last=1, keep_best=("loss", "min", 1))
    run = Run(tmp_path, checkpoint_policy=policy)
    made = []
    for loss in (9, 8, 7, 1, 5, 6, 7, 8, 9):
        run.step()
        pending = run.accelerator.checkpoint(metrics={"loss": loss})
        if pending is not None:
            made.append(pending.wait().step)
    run.accelerator.end_training()
    assert made == [2, 4, 6, 8]
    assert [checkpoint.step for checkpoint in Store(tmp_path / "checkpoints").list()] == [4, 8]


def test_a_resumed_run_saves_at_the_same_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=3))
    for _ in range(5):
        run.step()
        run.accelerator.checkpoint()
    run.accelerator.save_state()
    again = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=3))
    resumed = again.accelerator.resume()
    assert resumed is not None
    assert resumed.step == 5
    assert again.accelerator.checkpoint() is None
    again.step()
    assert again.accelerator.checkpoint() is not None
    again.accelerator.end_training()


def test_nothing_is_saved_inside_a_window(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=1), gradient_accumulation_steps=2)
    due = []
    for _ in range(6):
        with run.accelerator.accumulate(run.model):
            run.step()
        due.append(run.accelerator.checkpoint() is not None)
    run.accelerator.end_training()
    assert due == [False, True] * 3


def test_a_failure_in_the_background_comes_out(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "the disk is on fire")

    for ask in ("checkpoint", "save_state", "wait_for_checkpoint", "end_training"):
        run = Run(tmp_path / ask, checkpoint_policy=CheckpointPolicy(every_n_steps=1))
        run.step()
        store = run.accelerator._saver._store
        assert store is not None
        commit, store._saves._committed = store._saves._committed, fail  # type: ignore[method-assign,assignment]
        pending = run.accelerator.checkpoint()
        assert pending is not None
        while not pending.done():
            time.sleep(0.001)
        store._saves._committed = commit  # type: ignore[method-assign]
        with pytest.raises(BackgroundSaveError, match="on fire"):
            getattr(run.accelerator, ask)()
        run.step()
        assert run.accelerator.checkpoint() is not None
        run.accelerator.end_training()


def test_a_failure_that_comes_back_is_told_in_full_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=1, on_error="warn"))
    store = run.accelerator._saver._store
    assert store is not None
    commit, asked = store._saves._committed, itertools.count()

    def fail(*_: Any) -> None:
        raise OSError(5, f"attempt {next(asked)} ended in flames")

    def step() -> None:
        run.step()
        pending = run.accelerator.checkpoint()
        assert pending is not None
        with contextlib.suppress(BackgroundSaveError):
            pending.wait()

    store._saves._committed = fail  # type: ignore[method-assign,assignment]
    for _ in range(9):
        step()
    store._saves._committed = commit  # type: ignore[method-assign]
    step()
    step()
    assert caplog.text.count("ended in flames") == 1
    told = [record.getMessage() for record in caplog.records if record.name == "keepstep.train.pace.counts"]
    assert [text.partition(" in a row")[0] for text in told[1:]] == [
        *(f"{count} checkpoints" for count in (2, 4, 8)),
        "Checkpoints are saved again.",
    ]


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.accelerator.register_for_checkpointing(Counter(lambda: None))
    with pytest.raises(UnsupportedTypeError, match="registered_0"):
        run.accelerator.save_state()
    assert names(tmp_path) == []


def test_places_that_were_never_given() -> None:
    accelerator = Run(None).accelerator
    for call in (accelerator.save_state, accelerator.load_state, accelerator.resume):
        with pytest.raises(UsageError, match="project_dir"):
            call()
    with pytest.raises(UsageError, match="project_dir"):
        _ = accelerator.save_iteration


def test_a_missing_place_is_told_at_the_first_call_and_not_when_a_save_is_due() -> None:
    accelerator = Run(None, checkpoint_policy=CheckpointPolicy(every_n_steps=1000)).accelerator
    with pytest.raises(UsageError, match="project_dir"):
        accelerator.checkpoint()


def test_nothing_to_load_or_resume(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.accelerator.resume() is None
    with pytest.raises(CheckpointNotFoundError, match="resume"):
        run.accelerator.load_state()
    with pytest.raises(CheckpointNotFoundError):
        run.accelerator.load_state(tmp_path / "nowhere")
    with pytest.raises(NotPreparedError, match="prepare"):
        Accelerator(cpu=True, project_dir=tmp_path).resume()
    with pytest.raises(NotPreparedError, match="prepare"):
        Accelerator(cpu=True, project_dir=tmp_path).checkpoint()


def prepare_more(run: Run) -> None:
    run.accelerator.prepare(torch.nn.Linear(1, 1))


def prepare_scheduler(run: Run) -> None:
    run.accelerator.prepare(torch.optim.lr_scheduler.StepLR(run.optimizer, 1))


def prepare_loader(run: Run) -> None:
    run.accelerator.prepare(DataLoader(Noisy()))


def prepare_optimizer(run: Run) -> None:
    run.accelerator.prepare(torch.optim.SGD(run.plain.parameters(), lr=0.1))


def register(run: Run) -> None:
    run.accelerator.register_for_checkpointing(Counter())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (prepare_more, "model_1"),
        (prepare_optimizer, "optimizer_1"),
        (prepare_scheduler, "schedulers"),
        (prepare_loader, "1 loaders were prepared and 2 are now"),
        (register, "registered_1"),
    ],
)
def test_other_objects_than_were_saved(change: Callable[[Run], None], named: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.accelerator.register_for_checkpointing(Counter(5))
    run.step()
    run.accelerator.save_state()
    other = Run(tmp_path)
    mine = Counter(9)
    other.accelerator.register_for_checkpointing(mine)
    change(other)
    weights, generator = other.weights(), torch.get_rng_state()
    with pytest.raises(MismatchError, match=named):
        other.accelerator.resume()
    assert_same(other.weights(), weights)
    assert mine.value == 9
    assert other.accelerator.step == 0
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 5}, "batch_size was 4 and is 5 now"),
        ({"length": 24}, "dataset length was 20 and is 24 now"),
        ({"mixed_precision": "bf16"}, "mixed_precision was 'no' and is 'bf16' now"),
    ],
)
def test_other_data_in_the_middle_of_a_pass(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in run.loader:
        run.accelerator.save_state()
        break
    other = Run(tmp_path, **options)
    weights = other.weights()
    with pytest.raises(MismatchError, match=words):
        other.accelerator.resume()
    assert_same(other.weights(), weights)


def test_other_data_between_passes_is_fine(tmp_path: Path) -> None:
    run = Run(tmp_path)
    list(run.loader)
    run.accelerator.save_state()
    other = Run(tmp_path, batch_size=5)
    assert other.accelerator.resume() is not None
    assert len(list(other.loader)) == 4


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.step()
    older = run.weights()
    run.accelerator.save_state()
    run.step()
    newest = Path(run.accelerator.save_state())
    flip_a_bit(newest / "model.safetensors")
    other = Run(tmp_path)
    with caplog.at_level(logging.ERROR):
        resumed = other.accelerator.resume()
    assert resumed is not None
    assert (resumed.step, other.accelerator.step) == (1, 1)
    assert_same(other.weights(), older)
    assert "checkpoint_1" in caplog.text
    flip_a_bit(resumed.path / "model.safetensors")
    with pytest.raises(NoValidCheckpointError):
        Run(tmp_path).accelerator.resume()


def test_pending_gradients_are_restored_and_others_removed(tmp_path: Path) -> None:
    run = Run(tmp_path, gradient_accumulation_steps=2)
    with run.accelerator.accumulate(run.model):
        run.step()
    gradients = [parameter.grad.clone() for parameter in run.plain.parameters()]
    run.accelerator.save_state()
    with run.accelerator.accumulate(run.model):
        run.step()
    run.accelerator.save_state()
    other = Run(tmp_path, gradient_accumulation_steps=2)
    other.accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_0")
    assert not other.accelerator.sync_gradients
    assert_same([parameter.grad for parameter in other.plain.parameters()], gradients)
    other.accelerator.load_state()
    assert other.accelerator.sync_gradients
    assert [parameter.grad for parameter in other.plain.parameters()] == [None, None]
    assert_same(other.weights(), run.weights())


def test_a_full_disk_need_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = CheckpointPolicy(every_n_steps=1, on_error="warn")
    run = Run(tmp_path, checkpoint_policy=policy)
    run.step()
    run.accelerator.checkpoint()
    run.accelerator.wait_for_checkpoint()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").write_text("a file stands where the store was")
    run.step()
    assert run.accelerator.checkpoint() is None
    assert "was not saved" in caplog.text
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    run.step()
    run.accelerator.checkpoint()
    run.accelerator.wait_for_checkpoint()
    newest = Store(tmp_path / "checkpoints").latest()
    assert newest is not None
    assert newest.step == 3


def test_the_first_resume_holds_the_store(tmp_path: Path) -> None:
    Run(tmp_path).accelerator.resume()
    assert (tmp_path / "checkpoints" / ".keepstep" / "lock").stat().st_size > 0


def test_another_window_in_the_middle_of_one_is_refused(tmp_path: Path) -> None:
    first = Run(tmp_path, gradient_accumulation_steps=3)
    with first.accelerator.accumulate(first.model):
        first.step()
    first.accelerator.save_state()
    with pytest.raises(MismatchError, match="gradient_accumulation_steps was 3 and is 2 now, 1 micro"):
        Run(tmp_path, gradient_accumulation_steps=2).accelerator.resume()


def test_the_position_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = Run(tmp_path)
    for _ in itertools.islice(first.loader, 3):
        assert first.loader.position > 0
    assert first.loader.position == 0, "a pass that was left is over"
    for _ in first.loader:
        if first.loader.position == 2:
            first.accelerator.save_state()
            break
    second = Run(tmp_path)
    second.accelerator.resume()
    assert second.loader.position == 2
    assert [second.loader.position for _ in second.loader] == [3, 4, 5]


def test_seeding_before_and_after_the_accelerator_is_made_gives_the_same_order(tmp_path: Path) -> None:
    def order(seed: int, *, first: bool) -> list[Any]:
        torch.manual_seed(seed if first else 99)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        loader = accelerator.prepare(DataLoader(range(20), 20, shuffle=True))
        return [batch.tolist() for batch in loader]

    assert order(1, first=True) == order(1, first=False)
    assert order(1, first=False) != order(2, first=False)


class OtherScheduler:
    """As another library would write one: no LRScheduler, but it steps an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.updates = optimizer, 0

    def step(self) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


def test_schedulers_of_other_libraries_are_saved(tmp_path: Path) -> None:
    def build() -> tuple[Run, Any]:
        run = Run(tmp_path)
        return run, run.accelerator.prepare(OtherScheduler(run.optimizer))

    run, scheduler = build()
    run.step()
    scheduler.step()
    run.accelerator.save_state()
    run, scheduler = build()
    run.accelerator.resume()
    assert scheduler.updates == 1


def test_prepare_tells_what_it_will_not_save(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True)
    counter = Counter()
    assert accelerator.prepare(counter) is counter
    assert "register_for_checkpointing" in caplog.text


def test_a_forgotten_resume_is_told_and_destroys_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: int, *, resume: bool) -> Accelerator:
        accelerator = Accelerator(
            project_dir=tmp_path, cpu=True, checkpoint_policy=CheckpointPolicy(every_n_steps=1, keep_last=2)
        )
        model = torch.nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if resume:
            accelerator.resume()
        for _ in range(steps):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
            accelerator.checkpoint()
        accelerator.wait_for_checkpoint()
        return accelerator

    def steps() -> list[int | None]:
        return [checkpoint.step for checkpoint in Store(tmp_path / "checkpoints").list()]

    run(5, resume=True)
    run(1, resume=True)
    assert "another run" not in caplog.text
    assert steps() == [5, 6]
    run(4, resume=False)
    assert caplog.text.count("holds checkpoints of another run, up to step 6") == 1
    assert steps() == [5, 6, 3, 4]


def test_a_run_that_ends_with_steps_unsaved_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(
        project_dir=tmp_path / "run", cpu=True, checkpoint_policy=CheckpointPolicy(every_n_steps=2)
    )
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        accelerator.checkpoint()
    accelerator.end_training()
    assert "ends 1 optimizer steps after its last checkpoint" in caplog.text
    caplog.clear()
    accelerator.save_state(tmp_path / "elsewhere")
    accelerator.end_training()
    assert "after its last checkpoint" not in caplog.text


@pytest.mark.parametrize("keep", [{}, {"keep_every_n_steps": 1}])
def test_a_run_that_keeps_all_checkpoints_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: dict[str, int]
) -> None:
    policy = CheckpointPolicy(every_n_steps=1, staging="awaited", **keep)
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, checkpoint_policy=policy)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(14):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        accelerator.checkpoint()
    first = accelerator.save_state(tmp_path / "by hand")
    accelerator.end_training()
    assert caplog.text.count("keeps every checkpoint") == (0 if keep else 1)
    assert Checkpoint.open(first).manifest.run == Store(tmp_path / "checkpoints").list()[0].manifest.run


def test_a_failure_costs_no_checkpoint_that_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=1, on_error="warn"))
    second_waits = threading.Event()
    fail_once(run.accelerator._saver._store, lambda: second_waits.wait(60))
    run.step()
    run.accelerator.checkpoint()
    run.step()
    at_call(monkeypatch, PendingSave, "wait", second_waits.set)
    assert run.accelerator.checkpoint() is not None
    run.accelerator.wait_for_checkpoint()
    assert Store(tmp_path / "checkpoints").list()[-1].step == 2
    counts = run.accelerator.checkpoint_counts
    assert (counts.saved, counts.failed, counts.waited) == (1, 1, 1)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_finished_run_is_saved_though_its_last_checkpoint_failed(tmp_path: Path, on_error: Any) -> None:
    run = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=1, on_error=on_error))
    fail_once(run.accelerator._saver._store)
    run.step()
    run.accelerator.checkpoint()
    with pytest.raises(BackgroundSaveError) if on_error == "raise" else contextlib.nullcontext():
        run.accelerator.end_training(finished=True)
    saved = Store(tmp_path / "checkpoints").list()[-1]
    assert saved.name == "checkpoint_1"
    assert saved.verify().sound
    counts = run.accelerator.checkpoint_counts
    assert (counts.saved, counts.failed) == (1, 1)


def test_a_checkpoint_that_could_not_be_begun_counts_as_failed_and_its_steps_as_unsaved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=1, on_error="warn"))
    run.step()
    run.accelerator.checkpoint()
    run.accelerator.wait_for_checkpoint()
    run.step()

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreReadOnlyError("read-only now")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save_in_background", refuse)
        assert run.accelerator.checkpoint() is None
    assert run.accelerator.checkpoint_counts.failed == 1
    caplog.clear()
    run.accelerator.end_training()
    assert "ends 1 optimizer steps after its last checkpoint" in caplog.text


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_models_are_exported_and_memory_is_freed_though_a_checkpoint_failed(
    tmp_path: Path, on_error: Any
) -> None:
    run = Run(tmp_path / "project", checkpoint_policy=CheckpointPolicy(every_n_steps=1, on_error=on_error))
    accelerator, store = run.accelerator, run.accelerator._saver._store
    for use in (lambda: accelerator.save_model(run.model, tmp_path / "final"), accelerator.clear):
        fail_once(store)
        run.step()
        accelerator.checkpoint()
        with pytest.raises(BackgroundSaveError) if on_error == "raise" else contextlib.nullcontext():
            use()
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert accelerator._state.is_empty
