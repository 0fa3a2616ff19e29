from __future__ import annotations

from typing import Any

import pytest
import torch

from keepstep.train.passes import Cursor, OpenPass
from keepstep.train.progress import Progress


def make(loaders: int = 2) -> tuple[Progress, list[Cursor]]:
    progress = Progress()
    return progress, [progress.new_cursor() for _ in range(loaders)]


def restored(progress: Progress) -> tuple[Progress, list[Cursor]]:
    other, cursors = make(len(progress.cursors))
    other.load_state_dict(progress.state_dict())
    assert other.state_dict() == progress.state_dict()
    return other, cursors


def deliver(progress: Progress, cursor: Cursor, batches: int = 1) -> OpenPass:
    entry = progress.begin(cursor)
    cursor.position += batches
    return entry


def still_to_run(progress: Progress, count: int) -> list[int]:
    return list(progress.epochs(count))


def test_a_first_run_has_everything_before_it() -> None:
    progress, _ = make()
    assert still_to_run(restored(progress)[0], 3) == [0, 1, 2]


def test_an_epoch_is_done_once_a_pass_ended_and_none_is_open() -> None:
    progress, (train, held_out) = make()
    epochs = progress.epochs(3)
    next(epochs)
    assert still_to_run(restored(progress)[0], 3) == [0, 1, 2]
    entry = deliver(progress, train, 4)
    assert still_to_run(restored(progress)[0], 3) == [0, 1, 2]
    inner = deliver(progress, held_out)
    progress.end(inner)
    assert still_to_run(restored(progress)[0], 3) == [0, 1, 2]
    progress.end(entry)
    assert still_to_run(restored(progress)[0], 3) == [1, 2]
    assert list(epochs) == [1, 2]
    assert still_to_run(restored(progress)[0], 3) == []
    assert still_to_run(restored(progress)[0], 5) == [3, 4]


def test_an_evaluation_that_comes_first_does_not_end_the_epoch() -> None:
    progress, (train, held_out) = make()
    next(progress.epochs(2))
    with torch.no_grad():
        progress.end(deliver(progress, held_out))
    between, (train_again, held_out_again) = restored(progress)
    assert restored(between)[0].state_dict() == progress.state_dict()
    assert next(between.epochs(2)) == 0
    assert between.skips(held_out_again)
    assert not between.skips(train_again)
    progress.end(deliver(progress, train))
    assert still_to_run(restored(progress)[0], 2) == [1]


def test_an_evaluation_that_comes_last_is_still_the_epilogue_after_a_resume() -> None:
    progress, (train, held_out) = make()
    next(progress.epochs(2))
    progress.end(deliver(progress, train))
    with torch.no_grad():
        deliver(progress, held_out, 2)
    other, (train_again, again) = restored(progress)
    epochs = other.epochs(2)
    next(epochs)
    assert other.skips(train_again)
    with torch.no_grad():
        other.end(other.begin(again))
    assert still_to_run(restored(other)[0], 2) == [1]
    assert next(epochs) == 1
    with torch.no_grad():
        other.end(deliver(other, again))
    assert still_to_run(restored(other)[0], 2) == [1]


def test_a_checkpoint_between_two_training_loops_of_an_epoch_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress, (first, second) = make()
    epochs = progress.epochs(3)
    for _ in range(2):
        next(epochs)
        progress.end(deliver(progress, first))
        progress.goes_on(first)
        with torch.no_grad():
            progress.end(deliver(progress, second))
        progress.end(deliver(progress, second))
        progress.state_dict()
    assert not caplog.messages
    with torch.no_grad():
        progress.end(deliver(progress, second))
    assert not caplog.messages
    progress.end(deliver(progress, second))
    progress.end(deliver(progress, second))
    assert ["between two loops of epoch 1" in message for message in caplog.messages] == [True]


def test_an_epoch_that_is_trained_by_hand_is_done_once_an_evaluation_has_ended_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress, (held_out, _) = make()

    def evaluate() -> None:
        with torch.no_grad():
            progress.end(deliver(progress, held_out))

    for epoch in progress.epochs(2):
        evaluate()
        assert still_to_run(restored(progress)[0], 2)[0] == epoch
        for _ in range(3):
            progress.note_training()
            assert still_to_run(restored(progress)[0], 2)[0] == epoch, "the rest is still to come"
            caplog.clear()
        other, (again, _) = restored(progress)
        next(other.epochs(2))
        assert not other.skips(again), "with the steps, what followed them comes again"
        assert [f"Epoch {epoch} is run again" in message for message in caplog.messages] == [True]
        caplog.clear()
        evaluate()
        assert still_to_run(restored(progress)[0], 2) == list(range(epoch + 1, 2))
    progress.note_training()
    assert not caplog.messages


def test_steps_after_an_evaluation_that_seemed_to_end_the_epoch_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress, (held_out, _) = make()
    for _ in progress.epochs(1):
        for _ in range(3):
            progress.note_training()
            other, _ = restored(progress)
            assert other.load_state_dict(progress.state_dict()) is None
            assert not progress.state_dict()["done"]
            with torch.no_grad():
                progress.end(deliver(progress, held_out))
            progress.state_dict()
    assert ["does not come to the optimizer's step" in message for message in caplog.messages] == [True] * 2


@pytest.mark.parametrize("beside", [False, True])
def test_passes_within_one_that_has_ended_are_not_skipped(beside: bool) -> None:
    progress, (first, second, held_out) = make(3)
    next(progress.epochs(2))
    outer = deliver(progress, first)
    for _ in range(2):
        progress.end(deliver(progress, held_out))
    inner = deliver(progress, second)
    for entry in (outer, inner) if beside else (inner, outer):
        progress.end(entry)
    deliver(progress, second)
    other, (first_again, second_again, held_out_again) = restored(progress)
    next(other.epochs(2))
    assert other.skips(first_again)
    assert not other.skips(second_again)
    other.begin(second_again)
    assert not other.skips(held_out_again)
    assert other.state_dict() == progress.state_dict()


def test_what_follows_the_last_epoch_is_warned_of_no_more(caplog: pytest.LogCaptureFixture) -> None:
    progress, (train, test) = make()
    for _ in progress.epochs(1):
        progress.end(deliver(progress, train))
        progress.state_dict()
    progress.end(deliver(progress, test))
    assert not caplog.messages


def test_passes_that_ended_before_the_outermost_are_skipped() -> None:
    progress, (first, second) = make()
    next(progress.epochs(2))
    progress.end(deliver(progress, first))
    deliver(progress, second, 3)
    other, (first_again, second_again) = restored(progress)
    assert next(other.epochs(2)) == 0
    assert other.skips(first_again)
    assert not other.skips(first_again)
    assert not other.skips(second_again)
    other.begin(second_again)
    assert (second_again.pass_number, second_again.position) == (0, 3)
    assert other.state_dict() == progress.state_dict()


def test_an_evaluation_inside_training_is_not_continued() -> None:
    progress, (train, held_out) = make()
    next(progress.epochs(2))
    deliver(progress, train, 2)
    try:
        with torch.no_grad():
            deliver(progress, held_out)
            state = progress.state_dict()
            raise ValueError
    except ValueError:
        assert progress.state_dict() == state
    assert [cursor["active"] for cursor in state["cursors"]] == [True, False]
    other, (_, again) = make()
    other.load_state_dict(state)
    other.begin(again)
    assert (again.pass_number, again.position) == (1, 0)


def test_a_loader_that_is_read_beside_another_without_gradients_is_continued() -> None:
    progress, (train, unlabelled) = make()
    epochs = progress.epochs(2)
    next(epochs)
    deliver(progress, train)
    with torch.no_grad():
        deliver(progress, unlabelled)
    assert len(progress.state_dict()["open"]) == 2, "at the first batch"
    train.position += 1
    with torch.no_grad():
        assert len(progress.state_dict()["open"]) == 2
    next(epochs)
    with torch.no_grad():
        deliver(progress, train)
        assert [saved["loader"] for saved in progress.state_dict()["open"]] == [1, 0]


def test_an_evaluation_on_its_own_is_continued() -> None:
    progress, (train, held_out) = make()
    next(progress.epochs(2))
    progress.end(deliver(progress, train))
    with torch.no_grad():
        deliver(progress, held_out, 2)
    other, (train_again, again) = restored(progress)
    next(other.epochs(2))
    assert other.skips(train_again)
    other.begin(again)
    assert again.position == 2


def test_a_pass_that_outlives_its_epoch_says_nothing_about_the_next() -> None:
    progress, (train, endless) = make()
    deliver(progress, endless, 5)
    epochs = progress.epochs(3)
    next(epochs)
    progress.end(deliver(progress, train))
    assert progress.state_dict()["done"]
    next(epochs)
    assert not progress.state_dict()["done"]
    other, (_, again) = restored(progress)
    assert next(other.epochs(3)) == 1
    other.begin(again)
    assert again.position == 5


def test_what_ran_before_epochs_does_not_end_one() -> None:
    progress, _ = make()
    next(progress.epochs(2))
    other, (_, again) = restored(progress)
    other.end(deliver(other, again))
    assert still_to_run(other, 2) == [0, 1]


def test_a_stale_iterator_cannot_end_what_was_restored() -> None:
    progress, (train, _) = make()
    next(progress.epochs(2))
    stale = deliver(progress, train, 2)
    state = progress.state_dict()
    progress.load_state_dict(state)
    progress.end(stale)
    assert progress.state_dict() == state


def test_the_last_batch_is_that_of_the_innermost_loader() -> None:
    progress, (train, held_out) = make()
    assert not progress.at_last_batch()
    deliver(progress, train, 3)
    train.length = 3
    assert progress.at_last_batch()
    inner = deliver(progress, held_out)
    assert not progress.at_last_batch()
    progress.end(inner)
    assert progress.at_last_batch()


def test_loops_after_one_another() -> None:
    progress, (train, _) = make()
    assert still_to_run(progress, 2) == [0, 1]
    next(progress.epochs(3))
    deliver(progress, train)
    other = restored(progress)[0]
    runs: list[Any] = [still_to_run(other, 2), still_to_run(other, 3), still_to_run(other, 2)]
    assert runs == [[], [0, 1, 2], [0, 1]]
