"""`keepstep launch` for real: processes, signals, ranks over gloo, exit codes.

Scripts that need no ranks to meet import no torch, so that most launches cost the launcher's own start alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.cli.processes import PROGRAM, run

TELL = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "KEEPSTEP_USE_CPU", "KEEPSTEP_MIXED_PRECISION")
told = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
open(f"told_{told['RANK']}.json", "w").write(json.dumps(told))
print("a line of rank", told["RANK"])
"""

MEET = """
import datetime, os, signal, sys, time
import torch, torch.distributed as dist
rank, start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
total = torch.ones(1)
dist.all_reduce(total)
store = dist.distributed_c10d._get_default_store()
seen = store.add("starts that this store has seen", 1)
dist.barrier()
if rank == 1 and start == "0":
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(total)
open(f"met_{rank}", "w").write(f"{start} {total.item()} {store.add('starts that this store has seen', 0)}")
dist.barrier()
dist.destroy_process_group()
"""

RESUME = """
import hashlib, os, pathlib, signal
import torch
from keepstep import Accelerator, CheckpointPolicy

restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def train(project, killed_at):
    torch.manual_seed(0)
    inputs = torch.randn(48, 4)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    accelerator = Accelerator(project_dir=project, checkpoint_policy=CheckpointPolicy(every_n_steps=2))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.resume()
    began = accelerator.step
    for epoch in accelerator.epochs(2):
        for x, y in loader:
            loss = torch.nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.checkpoint()
            if accelerator.step == killed_at:
                accelerator.wait_for_checkpoint()
                accelerator.wait_for_everyone()
                if accelerator.process_index == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    accelerator.end_training()
    state = accelerator.unwrap_model(model).state_dict()
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    return f"{began} {accelerator.step} {digest}"

resumed = train("killed", 9 if restarts == 0 else None)
whole = train("whole", None)
pathlib.Path(f"ended_{os.environ['RANK']}").write_text(f"{restarts}\\n{resumed}\\n{whole}")
"""

FAIL = """
import os, sys, time
if os.environ["RANK"] == "1":
    raise ValueError("a bug of rank 1")
time.sleep(60)
"""

WAIT = """
import os, pathlib, signal, subprocess, sys, time
rank = os.environ.get("RANK", "0")
loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(number, frame):
    time.sleep(0.3)  # as if it saved
    loads = "a loader that lives" if loader.poll() is None else "no loader"
    pathlib.Path(f"ended_{rank}").write_text(f"{signal.Signals(number).name}, {loads}, {loader.pid}")
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, end)
signal.signal(signal.SIGUSR1, lambda number, frame: pathlib.Path(f"usr1_{rank}").touch())
pathlib.Path(f"ready_{rank}").touch()
while True:
    time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def no_configuration(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default file of whoever runs the tests is none of theirs."""
    monkeypatch.setenv("KEEPSTEP_HOME", str(workdir / "home"))
    monkeypatch.delenv("OMP_NUM_THREADS")


def script(workdir: Path, text: str) -> str:
    (workdir / "script.py").write_text(text)
    return "script.py"


def launching(*arguments: str, cwd: Path, nohup: bool = False) -> subprocess.Popen[str]:
    under = ["nohup"] if nohup else ["env", "--default-signal=HUP,INT,QUIT"]  # whatever the tests run under
    return subprocess.Popen(
        [*under, *PROGRAM, "launch", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(*paths: Path, process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{paths} did not come within {timeout_s} s"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own means")
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_end_with_a_launcher_that_was_killed(workdir: Path, processes: int) -> None:
    script(workdir, "import os, time\nopen(f'pid_{os.getpid()}', 'w')\ntime.sleep(60)\n")
    process = launching("--cpu", "--num_processes", str(processes), "script.py", cwd=workdir)
    until = time.monotonic() + 60
    while len(list(workdir.glob("pid_*"))) < processes:
        assert time.monotonic() < until
        time.sleep(0.02)
    pids = [int(path.name.removeprefix("pid_")) for path in workdir.glob("pid_*")]
    assert all(is_running(pid) for pid in pids)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until, "ranks outlive their launcher"
        time.sleep(0.02)


def told(workdir: Path) -> list[Mapping[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(workdir.glob("told_*.json"))]


def test_two_processes_on_the_cpu_are_really_started(workdir: Path) -> None:
    """The file says one process and fp16; options say otherwise, and a busy port 29500 is in nobody's way."""
    (workdir / "c.yaml").write_text("num_processes: 1\nmixed_precision: fp16\nuse_cpu: true\n")
    options = ["--config_file", "c.yaml", "--num-processes", "2", "--mixed_precision", "bf16", "--tee", "1"]
    with socket.socket() as busy:
        with contextlib.suppress(OSError):  # somebody else keeps it busy
            busy.bind(("", 29500))
            busy.listen()
        done = run("launch", *options, script(workdir, TELL), "--lr", "0.1", "--cpu", cwd=workdir)
    assert done.returncode == 0, done.stderr
    ranks = told(workdir)
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]
    for rank in ranks:
        assert (rank["WORLD_SIZE"], rank["MASTER_ADDR"]) == ("2", "127.0.0.1")
        assert (rank["KEEPSTEP_USE_CPU"], rank["KEEPSTEP_MIXED_PRECISION"]) == ("true", "bf16")
        assert rank["arguments"] == ["--lr", "0.1", "--cpu"]
    assert sorted(done.stdout.splitlines()) == ["[rank 0] a line of rank 0", "[rank 1] a line of rank 1"]
    assert "Starting 2 processes on the CPU" in done.stderr


def test_the_output_of_one_process_is_kept_where_that_is_asked_for(workdir: Path) -> None:
    done = run("launch", "--cpu", "--log_dir", "logs", script(workdir, TELL), cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[rank 0] a line of rank 0\n"
    (kept,) = workdir.glob("logs/**/stdout.log")
    assert kept.read_text() == "a line of rank 0\n"


def test_a_killed_rank_makes_all_start_again_and_the_script_goes_on_by_itself(workdir: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "launch", "--cpu", "--num_processes", "2", script(workdir, RESUME)],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        restarts, resumed, whole = (workdir / f"ended_{rank}").read_text().splitlines()
        assert restarts == "1"
        assert resumed.split()[:2] == ["8", "12"], "it went on after the newest checkpoint"
        assert whole.split()[:2] == ["0", "12"]
        assert resumed.split()[2] == whole.split()[2], "the same bytes as the run that was not killed"
    assert "rank 1 (process" in done.stderr
    assert "was killed by SIGKILL" in done.stderr
    assert done.stderr.count("Restart 1 of at most 3") == 1


def wait_until_gone(pid: int) -> None:
    until_s = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until_s, f"process {pid} outlives the launch"
        time.sleep(0.05)


def test_a_bug_is_shown_once_and_its_exit_code_handed_on(workdir: Path) -> None:
    done = run("launch", "--cpu", "--num_processes", "2", "--quiet", script(workdir, FAIL), cwd=workdir)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: a bug of rank 1\n") == 1
    assert "rank 1 (process" in done.stderr
    assert "ended with exit code 1" in done.stderr
    assert "Not restarted: an error in the first 60 s" in done.stderr
    assert "Starting" not in done.stderr


@pytest.mark.parametrize(
    ("processes", "number", "nohup"),
    [
        (1, signal.SIGTERM, True),
        (1, signal.SIGINT, False),
        (1, signal.SIGHUP, False),
        (1, signal.SIGQUIT, False),
        (2, signal.SIGTERM, True),
        (2, signal.SIGHUP, False),
    ],
)
def test_signals_reach_the_ranks(workdir: Path, processes: int, number: signal.Signals, nohup: bool) -> None:
    ranks = [str(rank) for rank in range(processes)]
    said = ["--cpu", "--num_processes", str(processes), script(workdir, WAIT)]
    process = launching(*said, cwd=workdir, nohup=nohup)
    wait_for(*(workdir / f"ready_{rank}" for rank in ranks), process=process)
    for _ in range(2 if nohup else 0):
        process.send_signal(signal.SIGHUP)  # the terminal is closed, which nohup is to outlive
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    wait_for(*(workdir / f"usr1_{rank}" for rank in ranks), process=process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if processes == 1 else 128 + number), errors
    for rank in ranks:
        name, loader, pid = (workdir / f"ended_{rank}").read_text().split(", ")
        assert (name, loader) == (number.name, "a loader that lives"), "it may be needed to save"
        wait_until_gone(int(pid))


def test_the_second_signal_kills_one_process_that_does_not_end(workdir: Path) -> None:
    text = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: pathlib.Path('told').touch())\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    process = launching("--num_processes", "1", script(workdir, text), cwd=workdir)
    for name in ("ready", "told"):
        wait_for(workdir / name, process=process)
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL, errors


def test_one_process_that_is_killed_is_started_again(workdir: Path) -> None:
    text = (
        "import os, pathlib, signal, sys\n"
        "starts = pathlib.Path('starts')\n"
        "starts.open('a').write('x')\n"
        "if starts.stat().st_size <= int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(3 if starts.stat().st_size > 2 else 0)\n"
    )
    began_s = time.monotonic()
    done = run("launch", "--num_processes", "1", script(workdir, text), "1", cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert "Restart 1 of at most 3" in done.stderr
    gone_on = run("launch", "--num_processes", "1", "script.py", "0", cwd=workdir)
    assert gone_on.returncode == 3
    assert (workdir / "starts").read_text() == "xxx"
    given_up = run("launch", "--num_processes", "1", "--max_restarts", "2", "script.py", "99", cwd=workdir)
    assert given_up.returncode == 137
    assert (workdir / "starts").read_text() == "xxx" + "xxx"
    assert given_up.stderr.count("Restart ") == 2
    assert time.monotonic() - began_s < 30


def test_modules_and_programs(workdir: Path) -> None:
    (workdir / "package").mkdir()
    (workdir / "package" / "train.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    one = ["launch", "--num_processes", "1", "--quiet"]
    done = run(*one, "-m", "package.train", "-m", "x", cwd=workdir)
    assert (done.returncode, done.stdout) == (0, "__main__ ['-m', 'x']\n")
    done = run(*one, "--no_python", "sh", "-c", "echo $0 $KEEPSTEP_DEBUG_MODE; exit 5", cwd=workdir)
    assert (done.returncode, done.stdout) == (5, "sh\n")
    done = run(*one, "--debug", "--no_python", "printenv", "KEEPSTEP_DEBUG_MODE", cwd=workdir)
    assert done.stdout == "true\n"


@pytest.mark.soak
def test_two_machines_meet_and_a_rank_killed_on_one_starts_both_again(workdir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = script(workdir, MEET)
    common = ["--cpu", "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    machines = [
        subprocess.Popen(
            [
                *PROGRAM,
                "launch",
                *common,
                "--main_process_port",
                str(port),
                "--machine_rank",
                str(rank),
                name,
            ],
            cwd=workdir,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [machine.communicate(timeout=150)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(errors)
    assert [(workdir / f"met_{rank}").read_text() for rank in (0, 1)] == ["1 4.0 2"] * 2
    assert all("Restart 1 of at most 3" in text for text in errors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.py"], "no script none.py"),
        (["--num_processes", "2"], "Missing argument 'SCRIPT'"),
        (["--tpu", "script.py"], "TPUs"),
        (["--use_deepspeed", "script.py"], "DeepSpeed"),
        (["--config_file", "none.yaml", "script.py"], "no configuration file none.yaml"),
        (["-m", "--no_python", "script.py"], "both given"),
        (["--num_processes", "0", "script.py"], "num_processes"),
        (["--num_proceses", "1", "script.py"], "No such option.*--num_processes"),
        (["--mixed_precision", "fp8", "script.py"], "fp8"),
        (["--no_python", "--num_processes", "1", "no-such-program"], "no-such-program cannot be started"),
        (["--tee", "9", "script.py"], "--tee is '9'"),
        (["--rdzv_conf", "timeout", "script.py"], "--rdzv_conf is 'timeout'"),
        (["--gpu_ids", "0;1", "script.py"], "--gpu_ids is '0;1'"),
        (["--fsdp_offload_params", "true", "script.py"], "fsdp_offload_params has no effect .*--use_fsdp"),
        (["--dynamo_mode", "default", "script.py"], "dynamo_mode has no effect without --dynamo_backend"),
    ],
)
def test_mistakes_start_nothing(workdir: Path, arguments: list[str], words: str) -> None:
    script(workdir, "open('ran', 'w')")
    done = run("launch", *arguments, cwd=workdir)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(words, done.stderr), done.stderr
    assert not (workdir / "ran").exists()


def test_one_process_is_started_without_importing_torch(workdir: Path) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from keepstep.cli.main import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "launch", "--cpu", script(workdir, "")],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "False")
