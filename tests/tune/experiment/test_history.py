"""How trials stand, by what the journal says."""

from __future__ import annotations

import pytest

from keepstep.errors import JournalError
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import (
    Act,
    CheckpointsDropped,
    DriverStarted,
    ExperimentEnded,
    ExperimentMade,
    Record,
    ResultReported,
    TrialAgain,
    TrialEnded,
    TrialFailed,
    TrialMade,
    TrialStarted,
)

A, B = "e0000_00000", "e0000_00001"
FIRST = "checkpoint_000000"


def made(trial: str = A) -> TrialMade:
    return TrialMade(
        time=1.0,
        trial=trial,
        config={"x": 1},
        evaluated={"x": 1},
        tag="0",
        dirname=trial,
        resources={"cpu": 1.0},
    )


def started(trial: str = A) -> TrialStarted:
    return TrialStarted(time=2.0, trial=trial, pid=7, host="here", ip="127.0.0.1")


def driver(time: float) -> DriverStarted:
    return DriverStarted(time=time, host="here", pid=2)


def failed(*, final: bool) -> TrialFailed:
    return TrialFailed(time=9.0, trial=A, error="boom", final=final)


def result(
    iteration: int,
    trial: str = A,
    checkpoint: str | None = None,
    decision: str = "CONTINUE",
    acts: tuple[Act, ...] = (),
) -> ResultReported:
    return ResultReported(
        time=2.0 + iteration,
        trial=trial,
        iteration=iteration,
        metrics={"loss": 1 / iteration},
        this_s=1.0,
        total_s=float(iteration),
        since=iteration,
        checkpoint=checkpoint,
        bytes=10 if checkpoint else 0,
        decision=decision,
        acts=acts,
    )


def history(*records: Record) -> History:
    first = ExperimentMade(time=1.0, id="e0000" + "0" * 11, name="n", trainable="t", seed=1, spec={})
    return History.of([first, driver(1.0), *records], "/runs/n")


def test_a_result_has_the_automatic_fields() -> None:
    said = history(made(), started(), result(1, checkpoint=FIRST)).trial(A).last_result
    assert (said["loss"], said["training_iteration"], said["trial_id"], said["done"]) == (1.0, 1, A, False)
    assert (said["pid"], said["hostname"], said["time_total_s"]) == (7, "here", 1.0)
    assert said["checkpoint_dir_name"] == FIRST


def test_a_trial_that_ran_when_its_driver_was_killed_waits_to_go_on_from_its_last_checkpoint() -> None:
    trial = history(made(), started(), result(1, checkpoint=FIRST), result(2), driver(9.0)).trial(A)
    assert (trial.status, trial.iteration, trial.next_checkpoint) == ("PENDING", 2, 1)
    assert trial.resume_from is not None
    assert (trial.resume_from.name, trial.resume_from.iteration) == (FIRST, 1)


def test_the_time_between_two_drivers_does_not_count() -> None:
    found = history(made(), started(), result(1), driver(1000.0), started())
    assert found.elapsed_s(1000.0) == pytest.approx(2.0)


def test_stopped_trials_are_terminated_and_paused_ones_wait() -> None:
    found = history(made(A), made(B), result(1, A, decision="STOP"), result(1, B, decision="PAUSE"))
    assert (found.trial(A).status, found.trial(A).last_result["done"]) == ("TERMINATED", True)
    assert found.trial(B).status == "PAUSED"
    assert list(found.live) == [B]


def test_an_exploit_takes_over_checkpoint_configuration_and_iteration() -> None:
    config = {"x": 5}
    exploit = Act(do="exploit", trial=B, source=A, checkpoint=FIRST, config=config, evaluated=config)
    taken = result(2, B, decision="NOOP", acts=(exploit,))
    found = history(made(A), made(B), result(4, A, checkpoint=FIRST), taken)
    trial = found.trial(B)
    assert (trial.status, trial.iteration, trial.config) == ("PAUSED", 4, config)
    assert trial.resume_from is found.trial(A).checkpoints[0]
    assert trial.next_checkpoint == 0


def test_a_failure_that_is_not_final_lets_the_trial_wait() -> None:
    trial = history(made(), started(), failed(final=False)).trial(A)
    assert (trial.status, trial.num_failures) == ("PENDING", 1)


def test_a_final_failure_ends_the_trial() -> None:
    trial = history(made(), started(), failed(final=True)).trial(A)
    assert (trial.status, trial.error) == ("ERROR", "boom")


def test_a_trial_run_again_anew_begins_at_zero_and_gives_no_checkpoint_an_old_name() -> None:
    again = TrialAgain(time=10.0, trial=A, anew=True)
    found = history(made(), started(), result(3, checkpoint="checkpoint_000002"), failed(final=True), again)
    trial = found.trial(A)
    assert (trial.status, trial.iteration, trial.resume_from) == ("PENDING", 0, None)
    assert trial.next_checkpoint == 3
    assert list(found.live) == [A]


@pytest.mark.parametrize(
    ("why", "status"), [("time", "TERMINATED"), ("interrupted", "PENDING"), ("failed", "PENDING")]
)
def test_trials_end_with_their_experiment_only_if_no_more_is_to_be_spent(why: str, status: str) -> None:
    found = history(made(), started(), result(1), ExperimentEnded(time=5.0, why=why))
    assert found.trial(A).status == status


def test_dropped_checkpoints_are_gone_and_their_numbers_are_not_given_again() -> None:
    second = "checkpoint_000001"
    dropped = CheckpointsDropped(time=6.0, checkpoints=((A, second),))
    trial = history(made(), result(1, checkpoint=FIRST), result(2, checkpoint=second), dropped).trial(A)
    assert [record.name for record in trial.checkpoints] == [FIRST]
    assert trial.next_checkpoint == 2


def test_a_record_of_an_unknown_trial_is_damage() -> None:
    with pytest.raises(JournalError, match="speaks of a trial 'e0000_00007'"):
        history(TrialEnded(time=1.0, trial="e0000_00007"))
