"""What the local executor promises of its processes: deaths, orphans, output, environment, speed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.tune.executors import trials
from tests.tune.executors.conftest import KINDS, TOTAL, Kind
from tests.tune.executors.driving import Drive, Ended, Go, Next, Reported, Started

from keepstep import tune
from keepstep.errors import UsageError
from keepstep.tune.executors.local import LocalExecutor

Drives = Callable[..., Drive]


@pytest.fixture(params=["local"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., Drive]]:
    """A local executor of a test's own."""
    made: list[LocalExecutor] = []

    def of(trainable: object, **total: float) -> Drive:
        made.append(LocalExecutor(trainable, total=total or TOTAL))
        return Drive(made[-1], tmp_path)

    yield of
    for executor in made:
        executor.close()
        executor.close()


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def gone(*pids: int, within_s: float = 3.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.01)
    return not any(map(alive, pids))


@pytest.mark.parametrize(
    ("name", "error", "killed"),
    [
        ("SIGKILL", "killed by SIGKILL (out of memory?)", True),
        ("SIGSEGV", "crashed with SIGSEGV", False),
        ("40", "crashed with signal 40", False),  # a number without a name
    ],
)
def test_a_process_that_dies_is_a_failure_that_says_how(
    drive: Drives, name: str, error: str, killed: bool
) -> None:
    results, end = drive().run("t", {"do": "kill_itself", "signal": name})
    assert len(results) == 1
    assert (end.error, end.killed) == (error, killed)


def test_a_process_that_ends_itself_without_a_word_is_a_failure(drive: Drives) -> None:
    _, end = drive().run("t", {"do": "os_exit"})
    assert "exit status 7" in end.error
    assert not end.killed


@pytest.mark.parametrize("way", ["end", "kill"])
def test_whatever_a_trial_started_ends_with_it(drive: Drives, way: str) -> None:
    d = drive()
    job = d.launch("t", {"do": "family", "hang": way == "kill"})
    pids = d.event(job.run, Reported).metrics["pids"]
    other = d.launch("other", {"do": "family", "hang": True})
    others = d.event(other.run, Reported).metrics["pids"]
    assert all(map(alive, [*pids, *others]))
    if way == "kill":
        d.order(job.run, Go())
        time.sleep(0.05)
        d.executor.kill(job.run)
    d.last(job.run)
    assert gone(*pids)
    assert all(map(alive, others))  # the orphan, too, is its own trial's
    d.executor.kill(other.run)
    d.last(other.run)
    assert gone(*others)


def test_a_killed_trial_that_hangs_is_gone_at_once_and_its_resources_are_free(drive: Drives) -> None:
    d = drive()
    job = d.launch("t", {"do": "hang"}, resources=TOTAL)
    pid = d.event(job.run, Reported).metrics["pid"]
    d.order(job.run, Go())
    d.executor.kill(job.run)
    assert d.last(job.run)[0].killed
    assert not alive(pid)
    assert d.executor.fits(TOTAL)


def test_output_goes_to_the_trials_files_children_included(drive: Drives) -> None:
    d = drive()
    (result,), _ = d.run("t", {"do": "print", "read": True})
    assert result.metrics == {"stdin": ""}
    assert (d.root / "t" / "stdout").read_text() == "to stdout\necho from a child\n".replace("echo ", "")
    assert (d.root / "t" / "stderr").read_text() == "to stderr\n"


def test_a_trial_that_prints_megabytes_costs_the_driver_nothing(drive: Drives) -> None:
    d = drive()
    before = psutil.Process().memory_info().rss
    d.run("t", {"do": "print", "megabytes": 64})
    assert (d.root / "t" / "stdout").stat().st_size > 64 << 20
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_a_trial_has_its_threads_gpus_session_and_the_drivers_path(drive: Drives) -> None:
    d = drive()
    (one,), _ = d.run("one", {"do": "facts"})
    facts = one.metrics
    assert facts["session"] == facts["pid"] != os.getpid()
    assert facts["path"] == [str(Path(p).absolute()) for p in sys.path]
    assert facts["limits"] == [True]
    assert facts["gpus"] == ""
    assert facts["origin"] == str(Path.cwd())
    assert facts["modules"] == []  # neither torch nor numpy nor rich, unless the trial's own code imports it


def test_fractions_of_a_gpu_share_one_and_whole_ones_are_alone(drive: Drives) -> None:
    d = drive()
    half = [d.launch("", {"do": "facts"}, resources={"gpu": 0.5}) for _ in range(2)]
    whole = d.launch("", {"do": "facts"}, resources={"gpu": 1})
    seen = [d.event(job.run, Reported).metrics["gpus"] for job in (*half, whole)]
    assert seen == ["0", "0", "1"]
    assert not d.executor.fits({"gpu": 0.1})
    d.last(*(job.run for job in (*half, whole)))


def test_threads_are_those_of_the_resources_unless_the_user_says_otherwise(
    local: Drives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    d = local(trials.function)
    (fraction,), _ = d.run("a", {"do": "facts"}, resources={"cpu": 0.5})
    (two,), _ = d.run("b", {"do": "facts"}, resources={"cpu": 1.5})
    (own,), _ = d.run("c", {"do": "facts"}, env={"OMP_NUM_THREADS": "7"})
    assert [e.metrics["threads"] for e in (fraction, two, own)] == ["1", "2", "7"]


def test_a_closed_executor_leaves_nothing(local: Drives) -> None:
    d = local(trials.function)
    jobs = [d.launch("", {"do": "family", "hang": True}) for _ in range(2)]
    pids = [pid for job in jobs for pid in d.event(job.run, Reported).metrics["pids"]]
    server = psutil.Process(pids[0]).ppid()
    d.executor.close()
    assert gone(*pids, server)


def test_a_process_that_hangs_on_its_way_to_the_next_trial_can_be_killed(drive: Drives) -> None:
    d = drive("Counter")
    first, second = d.launch("first"), d.job("second", {"fail": "hang"})
    d.event(first.run, Reported)
    d.order(first.run, Next(job=second))
    d.executor.wait(0.1)
    d.executor.kill(second.run)
    assert d.last(second.run)[0].killed
    assert d.of(first.run)[-1] == Ended(run=first.run)
    assert d.executor.fits(TOTAL)


def test_a_process_that_died_before_it_could_become_the_next_trial_loses_nothing(drive: Drives) -> None:
    d = drive("Counter")
    first, second = d.launch("first"), d.job("second", {"end": 1})
    d.event(first.run, Reported)
    os.kill(d.of(first.run, Started)[0].pid, signal.SIGKILL)
    d.order(first.run, Next(job=second))
    assert isinstance(d.last(second.run)[0], Ended)
    assert d.of(first.run)[-1] == Ended(run=first.run)


DRIVER = """
import sys, time
from tests.tune.executors import trials
from tests.tune.executors.driving import Drive, Reported, Go
from pathlib import Path
from keepstep.tune.executors.local import LocalExecutor
d = Drive(LocalExecutor(trials.function, total={"cpu": 2.0}), Path(sys.argv[1]))
job = d.launch("t", {"do": "family", "hang": True})
print(*d.event(job.run, Reported).metrics["pids"], flush=True)
d.order(job.run, Go())
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["driver", "server"])
def test_trials_die_with_their_driver_and_with_the_process_that_started_them(
    tmp_path: Path, how: str
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        server = psutil.Process(pids[0]).ppid()
        assert all(map(alive, [*pids, server]))
        os.kill(driver.pid if how == "driver" else server, signal.SIGKILL)
        if how == "driver":
            driver.wait()
            assert gone(*pids, server, within_s=1.0)
        else:
            assert gone(pids[0], within_s=1.0)
    finally:
        driver.kill()
        driver.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_trials_fail_when_their_server_dies_and_the_next_one_gets_another(local: Drives) -> None:
    d = local(trials.function)
    job = d.launch("t", {"do": "hang"})
    pid = d.event(job.run, Reported).metrics["pid"]
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    (end,) = d.last(job.run)
    assert end.killed
    assert "SIGKILL" in end.error
    assert gone(pid)
    assert isinstance(d.run("again", {"do": "report"})[1], Ended)
    assert d.executor.fits(TOTAL)


def test_functions_and_classes_of_a_script_travel_whole(local: Drives) -> None:
    space: dict[str, object] = {"__name__": "__main__", "tune": tune, "helper": lambda x: x + 1}
    exec("def train(config):\n    tune.report({'y': helper(config['x'])})\n", space)
    exec(
        "class Mine(tune.Trainable):\n    def step(self):\n        return {'y': helper(1), 'done': True}\n",
        space,
    )
    assert local(space["train"]).run("t", {"x": 1})[0][0].metrics == {"y": 2}
    assert local(space["Mine"]).run("u")[0][0].metrics == {"y": 2, "done": True}


def test_what_cannot_travel_is_refused_with_a_way_out(local: Drives) -> None:
    lock = __import__("threading").Lock()

    def train(config: object) -> None:
        lock.acquire()

    with pytest.raises(
        UsageError, match=r"The trainable can't be sent to another process: .*lock.*inside the function"
    ):
        local(train)
    d = local(trials.function)
    _, end = d.run("t", {"do": "report", "x": lock})
    assert "configuration of trial name_of_t can't be sent" in end.error
    assert d.executor.fits(TOTAL)


def test_what_cannot_be_made_anew_fails_every_trial_with_the_reason(local: Drives, tmp_path: Path) -> None:
    (tmp_path / "gone_tomorrow.py").write_text("def train(config): pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        train = __import__("gone_tomorrow").train
        d = local(train)
        (tmp_path / "gone_tomorrow.py").write_text("raise SystemExit('not today')\n")
        for _ in range(2):
            _, end = d.run()
            assert "could not be made anew" in end.error
            assert "not today" in end.error
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["gone_tomorrow"]


def test_a_trainable_that_starts_threads_when_imported_gets_fresh_processes(
    local: Drives, tmp_path: Path
) -> None:
    (tmp_path / "with_thread.py").write_text(
        "import os, threading, time\n"
        "from keepstep import tune\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "def train(config):\n"
        "    tune.report({'threads': threading.active_count(), 'pid': os.getpid(), 'ppid': os.getppid()})\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        d = local(__import__("with_thread").train)
        (first,), end = d.run("a", env={"A": "1"})
        assert isinstance(end, Ended)
        assert first.metrics["threads"] == 2  # a forked one would have lost it
        job = d.launch("b", env={"A": "1"})
        pid = d.event(job.run, Started).pid
        d.executor.kill(job.run)
        assert d.last(job.run)[0].killed
        assert gone(pid)
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["with_thread"]


def test_large_parameters_are_shipped_once_and_large_configurations_arrive(local: Drives) -> None:
    data = bytes(32 << 20)

    def train(config: dict[str, object], data: bytes) -> None:
        tune.report({"bytes": len(data), "text": len(str(config["text"]))})

    d = local(tune.with_parameters(train, data=data))
    start = time.monotonic()
    for _ in range(5):
        (result,), _ = d.run("", {"text": "x" * (4 << 20)})
        assert result.metrics == {"bytes": 32 << 20, "text": 4 << 20}
    assert time.monotonic() - start < 10


def test_a_warm_server_starts_a_trial_in_milliseconds(drive: Drives) -> None:
    d = drive()
    d.run("warm", {"do": "report"})
    took = []
    for _ in range(10):
        start = time.perf_counter()
        job = d.launch("", {"do": "report", "n": 1})
        d.event(job.run, Started)
        took.append(time.perf_counter() - start)
        d.last(job.run)
    assert min(took) < 0.02, took


def test_a_process_that_the_trial_forked_cannot_speak_for_it(drive: Drives) -> None:
    (result,), end = drive().run("t", {"do": "foreign_report"})
    assert "name_of_t" in result.metrics["said"]
    assert isinstance(end, Ended)


def test_a_library_that_a_trial_imported_is_there_before_the_next_is_forked(
    local: Drives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")

    def train(config: object) -> None:
        import sys

        there = "numpy" in sys.modules
        import numpy as np

        tune.report({"there": there, "drawn": np.random.random()})  # noqa: NPY002

    d = local(train)
    results = [d.run()[0][0].metrics for _ in range(3)]
    assert [r["there"] for r in results] == [False, True, True]
    assert len({r["drawn"] for r in results}) == 3  # forked, and yet each draws other numbers
