"""Trials on a Ray cluster: what only happens there, and whole experiments."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from tests.tune.executors import trials
from tests.tune.executors.driving import Drive, Ended, Failed, Go, Reported, Started

from keepstep import tune
from keepstep.tune.executors import actor
from keepstep.tune.executors.actor import TrialActor
from keepstep.tune.executors.process import Errand
from keepstep.tune.executors.shipping import dumps
from keepstep.tune.executors.wire import event_of


def train(config: dict[str, Any]) -> None:
    """Counts on from its checkpoint; dies once, where it is told to."""
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = json.loads(Path(directory, "step").read_text()) + 1
    print("from", start)
    for step in range(start, 6):
        if step == config.get("dies_at") and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(json.dumps(step))
            said = {"loss": config["x"] / (step + 1), "from": start}
            tune.report(said, checkpoint=tune.Checkpoint.from_directory(directory))


@pytest.mark.usefixtures("cluster")
def test_an_experiment_on_a_cluster_stops_trials_early_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    grid = tune.Tuner(
        train,
        param_space={"x": tune.grid_search([1.0, 2.0, 3.0]), "dies_at": tune.sample_from(lambda s: 4)},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            max_concurrent_trials=1,
            scheduler=tune.schedulers.ASHAScheduler(max_t=6, grace_period=2, reduction_factor=2),
        ),
        run_config=tune.RunConfig(
            name="it",
            storage_path=tmp_path,
            executor="ray",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    assert not grid.errors
    steps = {result.config["x"]: result.metrics["training_iteration"] for result in grid}
    assert steps == {1.0: 6, 2.0: 2, 3.0: 2}
    best = grid.get_best_result()
    assert best.metrics["from"] == 4
    told = [json.loads(line) for line in Path(best.path, "result.json").read_text().splitlines()]
    assert [result["training_iteration"] for result in told] == [1, 2, 3, 4, 5, 6]
    assert len({result["pid"] for result in told}) == 2
    assert "its process died" in Path(best.path, "error.txt").read_text()
    assert Path(best.path, "stdout").read_text() == "from 0\nfrom 4\n"


def test_a_process_that_dies_and_one_that_takes_no_configuration_are_told_in_words(
    cluster: None, tmp_path: Path
) -> None:
    from keepstep.tune.executors.ray import RayExecutor

    executor = RayExecutor(trials.function)
    d = Drive(executor, tmp_path)
    assert executor.total["cpu"] == 4.0
    assert executor.total["licence"] == 1.0
    assert executor.total["memory"] > 1e6
    assert "object_store_memory" not in executor.total
    job = d.launch("t", {"do": "kill_itself", "signal": "SIGKILL"}, env={"MINE": "1"})
    (end,) = d.last(job.run)
    assert end.killed
    assert "its process died" in end.error
    told = d.launch("u", {"do": "print", "lock": sys._getframe()})
    (end,) = d.last(told.run)
    assert isinstance(end, Failed)
    assert "configuration of trial name_of_u can't be sent" in end.error
    job = d.launch("v", {"do": "print"})
    d.event(job.run, Reported)
    d.order(job.run, Go())
    d.last(job.run)
    assert (tmp_path / "v" / "stdout").read_text() == "to stdout\necho from a child\n".replace("echo ", "")
    assert (tmp_path / "v" / "stderr").read_text() == "to stderr\n"
    executor.close()


DRIVER = """
import sys, time
from pathlib import Path
from keepstep import tune

def train(config):
    for step in range(10):
        time.sleep(0.2)
        tune.report({"step": step}, checkpoint={"step": step})

config = tune.RunConfig(name="it", storage_path=sys.argv[1], executor="ray", verbose=0)
tune.Tuner(train, run_config=config).fit()
"""


def test_actors_die_with_their_driver(cluster: None, tmp_path: Path) -> None:
    import ray

    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    try:
        found = _await(lambda: [line for path in tmp_path.glob("it/*/result.json") for line in path.open()])
    finally:
        driver.kill()
        driver.wait()
    pid = json.loads(found[-1])["pid"]
    _await(lambda: not Path(f"/proc/{pid}").exists())


def _await(condition: Any, timeout_s: float = 60.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def test_a_machine_that_does_not_see_the_storage_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "_SHOWS_WITHIN_S", 0.2)
    d = Drive(None, tmp_path)  # type: ignore[arg-type]
    job = d.job("t", {"do": "report"})
    errand = dumps(Errand(job, job.path), "the job")
    told, over = TrialActor("127.0.0.1").begin(job.run, dumps(trials.function, "it"), errand)
    assert over
    (failed,) = map(event_of, told)
    assert isinstance(failed, Failed)
    assert f"{job.path} is not there on" in failed.error
    assert "s3://bucket/runs" in failed.error


@pytest.mark.timeout(30)
def test_output_that_can_not_be_written_ends_a_trial_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trial printed last waits in a buffer; its disk may be full by then."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.chdir(tmp_path)
    d = Drive(None, tmp_path)  # type: ignore[arg-type]
    job = d.job("t", {"do": "return", "value": None}, path="s3://bucket/t", stdout=None, stderr=None)
    told, over = TrialActor("127.0.0.1").begin(
        job.run, dumps(trials.function, "it"), dumps(Errand(job), "the job")
    )
    assert over
    assert [type(event_of(text)) for text in told] == [Started, Ended]


CLUSTER = """
import sys, time
import ray
from ray.cluster_utils import Cluster
from keepstep import tune
from keepstep.errors import UsageError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
machines = [cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False)

class Fall(tune.Callback):
    def on_trial_result(self, iteration, trials, trial, result, **info):
        if result["step"] == 2 and machines:
            cluster.add_node(num_cpus=1)
            cluster.remove_node(machines.pop(), allow_graceful=False)

def train(config):
    checkpoint = tune.get_checkpoint()
    start = checkpoint.load()["step"] + 1 if checkpoint else 0
    for step in range(start, 6):
        tune.report({"step": step, "from": start}, checkpoint={"step": step})
        time.sleep(0.5)

config = tune.RunConfig(
    name="it", storage_path=sys.argv[1], executor="ray", verbose=0, callbacks=[Fall()],
    failure_config=tune.FailureConfig(max_failures=1),
)
(result,) = tune.Tuner(train, run_config=config).fit()
print("said:", result.metrics["step"], result.metrics["from"], result.metrics["training_iteration"])
cluster.add_node(num_cpus=1)
wide = tune.RunConfig(name="wide", storage_path=sys.argv[1], executor="ray", verbose=0)
try:
    tune.Tuner(tune.with_resources(train, {"cpu": 2}), run_config=wide).fit()
except UsageError as error:
    print("said:", error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.soak
def test_a_machine_that_dies_takes_its_trials_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(CLUSTER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.partition("said: ")[2] for line in done.stdout.splitlines() if "said: " in line]
    assert said[0] in ("5 2 6", "5 3 6", "5 4 6", "5 5 6"), done.stderr[-3000:]
    assert "no single machine of the cluster has all of it" in said[1]
    (error,) = tmp_path.glob("it/*/error.txt")
    assert re.search("its machine died|can't be reached", error.read_text())
