"""One function and one class that do what their configuration says: trials of the contract suite."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from keepstep import tune


def function(config: dict[str, Any]) -> Any:
    """Do `config["do"]`."""
    return globals()[f"do_{config['do']}"](config)


def do_report(config: dict[str, Any]) -> None:
    for step in range(config.get("n", 3)):
        tune.report({"step": step, "x": config.get("x")})


def do_report_in_threads(config: dict[str, Any]) -> None:
    def report(thread: int) -> None:
        for step in range(5):
            directory = Path(f"made_{thread}")
            directory.mkdir(exist_ok=True)
            (directory / "said.txt").write_text(f"{thread} {step}")
            tune.report(
                {"thread": thread, "step": step}, checkpoint=tune.Checkpoint.from_directory(directory)
            )

    threads = [threading.Thread(target=report, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def do_return(config: dict[str, Any]) -> Any:
    return config["value"]


def do_yield(config: dict[str, Any]) -> Any:
    for step in range(3):
        yield {"step": step}


def do_values(config: dict[str, Any]) -> None:
    import numpy as np

    tune.report(
        {
            "nan": float("nan"),
            "inf": np.float32("inf"),
            "int": np.int64(3),
            "flag": np.bool_(True),
            "one": np.array([2.5]),
            "nested": {"a": (1, np.float64(2.0)), "what": object()},
            "array": np.zeros(3),
            "text": "NaN",
        }
    )


def do_context(config: dict[str, Any]) -> None:
    context = tune.get_context()
    tune.report(
        {
            "id": context.get_trial_id(),
            "name": context.get_trial_name(),
            "experiment": context.get_experiment_name(),
            "dir": context.get_trial_dir(),
            "cwd": str(Path.cwd()),
            "resources": context.get_trial_resources().required_resources,
            "world": [context.get_world_size(), context.get_world_rank()],
            "env": os.environ.get("MINE"),
            "checkpoint": tune.get_checkpoint() is not None,
        }
    )


def do_checkpoint(config: dict[str, Any]) -> None:
    """Count on from the checkpoint's number; each result has one."""
    checkpoint = tune.get_checkpoint()
    start = 0
    if checkpoint:
        with checkpoint.as_directory() as directory:
            start = json.loads((Path(directory) / "n.json").read_text()) + 1
    for n in range(start, start + config.get("n", 2)):
        (Path("made") / str(n)).mkdir(parents=True, exist_ok=True)
        (Path("made") / str(n) / "n.json").write_text(json.dumps(n))
        tune.report({"n": n}, checkpoint=tune.Checkpoint.from_directory(f"made/{n}"))


def do_vanishing(config: dict[str, Any]) -> None:
    checkpoint = None
    Path("gone").mkdir()
    checkpoint = tune.Checkpoint.from_directory("gone")
    Path("gone").rmdir()
    tune.report({"n": 1}, checkpoint=checkpoint)


def do_raise(config: dict[str, Any]) -> None:
    tune.report({"n": 1})
    raise ValueError("first line\nsecond line")


class UnspeakableError(Exception):
    def __init__(self, a: int, b: int) -> None:
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError("no words")


def do_unspeakable(config: dict[str, Any]) -> None:
    raise UnspeakableError(1, 2)


def do_exit(config: dict[str, Any]) -> None:
    sys.exit(config.get("status", 3))


def do_interrupt(config: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def do_stubborn(config: dict[str, Any]) -> None:
    """Catches what it can when it is to end, and writes down that its last block ran."""
    try:
        while True:
            try:
                tune.report({"n": 1})
            except Exception:  # noqa: BLE001 - that is the point
                Path("swallowed").touch()
    finally:
        Path("finally").touch()


def do_draw(config: dict[str, Any]) -> None:
    for _ in range(3):
        tune.report({"drawn": random.random()})


def do_kill_itself(config: dict[str, Any]) -> None:
    tune.report({"n": 1})
    os.kill(os.getpid(), getattr(signal, config["signal"], None) or int(config["signal"]))


def do_os_exit(config: dict[str, Any]) -> None:
    os._exit(7)


def do_family(config: dict[str, Any]) -> None:
    """Starts a child, a child in a session of its own, and an orphan of which nobody knows."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep)
    apart = subprocess.Popen(sleep, start_new_session=True)
    orphan = _orphan(sleep)
    tune.report({"pids": [os.getpid(), child.pid, apart.pid, orphan]})
    if config.get("hang"):
        time.sleep(600)


def _orphan(command: list[str]) -> int:
    read, write = os.pipe()
    if (first := os.fork()) == 0:
        os.setsid()
        left = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        os.write(write, str(left.pid).encode())
        os._exit(0)
    os.waitpid(first, 0)
    return int(os.read(read, 20))


def do_print(config: dict[str, Any]) -> None:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.system("echo from a child")
    if config.get("megabytes"):
        for _ in range(config["megabytes"]):
            print("x" * (1 << 20))
    tune.report({"stdin": sys.stdin.read() if config.get("read") else ""})


def do_facts(config: dict[str, Any]) -> None:
    torch = sys.modules.get("torch")
    tune.report(
        {
            "pid": os.getpid(),
            "ppid": os.getppid(),
            "session": os.getsid(0),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "origin": os.environ.get("TUNE_ORIG_WORKING_DIR"),
            "modules": sorted({"torch", "numpy", "rich"} & set(sys.modules)),
            "torch_threads": torch.get_num_threads() if torch else None,
            "path": sys.path,
            "limits": [signal.getsignal(signal.SIGINT) is signal.default_int_handler],
        }
    )


def do_hang(config: dict[str, Any]) -> None:
    tune.report({"pid": os.getpid()})
    time.sleep(600)


def do_foreign_report(config: dict[str, Any]) -> None:
    """A process that the trial forked must not speak for it."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            tune.report({"n": 1})
        except Exception as error:  # noqa: BLE001
            os.write(write, str(error).encode())
        os._exit(0)
    os.wait()
    tune.report({"said": os.read(read, 4000).decode()})


class Counter(tune.Trainable):
    """Counts; a file per event says what was called."""

    def setup(self, config: dict[str, Any]) -> None:
        self.n = 0
        self.calls = ["setup"]
        if config.get("fail") == "setup":
            raise ValueError("setup failed")

    def step(self) -> dict[str, Any]:
        self.n += 1
        if self.config.get("fail") == "step":
            raise ValueError("step failed")
        said: dict[str, Any] = {"n": self.n, "x": self.config.get("x"), "pid": "mine", "cwd": str(Path.cwd())}
        if self.n == self.config.get("end"):
            said["done"] = True
        if self.n == self.config.get("wish"):
            said["should_checkpoint"] = True
        return said

    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        Path(checkpoint_dir, "n.json").write_text(json.dumps(self.n))
        return self.config.get("saves", checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.n = json.loads(Path(checkpoint, "n.json").read_text())

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if new_config.get("fail") == "reset":
            raise ValueError("reset failed")
        self.n = 0
        if new_config.get("fail") == "hang":
            time.sleep(600)
        return bool(new_config.get("resets", True))

    def cleanup(self) -> None:
        Path(self.logdir, "cleaned").write_text(self.trial_id)


class Forgetful(tune.Trainable):
    """Has no save_checkpoint."""

    def step(self) -> dict[str, Any]:
        return {"n": self.iteration}
