from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep.checkpoint.crew import Crew, in_threads
from keepstep.checkpoint.format.source import _LocalFile
from keepstep.checkpoint.store import Store
from keepstep.errors import NoThreadError
from keepstep.outcome import Latch


@contextlib.contextmanager
def ctrl_c_after(delay_s: float) -> Iterator[None]:
    """Another thread takes the signal, so that it wakes nobody."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(delay_s, signal.raise_signal, [signal.SIGINT]).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def stepping_back() -> tuple[int, int, int, int]:
    """Niceness of a crew before and after it stepped back, and of the training then; before all."""
    began, crew = niceness(), Crew(2, "test")
    try:
        before = crew.submit(niceness).result()
        crew.step_back()
        return before, crew.submit(niceness).result(), niceness(), began
    finally:
        crew.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priority of their own")
@pytest.mark.parametrize("nicer_by", [0, 3, 8])
def test_a_crew_that_steps_back_lets_the_training_go_first(nicer_by: int) -> None:
    """Also a training that was started with `nice`."""
    seen = list[tuple[int, int, int, int]]()

    def train() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness() + nicer_by)
        seen.append(stepping_back())

    training = threading.Thread(target=train)
    training.start()
    training.join()
    ((before, after, of_training, began),) = seen
    assert before == of_training == began
    assert after == min(began + 5, 19)


def test_errors_reach_who_asks() -> None:
    crew = Crew(1, "test")

    def fail() -> None:
        raise KeyError("why")

    future = crew.submit(fail)
    after = crew.submit(lambda: 1)
    crew.close()
    with pytest.raises(KeyError, match="why"):
        future.result()
    assert after.result() == 1


def test_a_thread_that_could_not_be_started_is_started_for_the_next_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    crew = Crew(1, "test")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NoThreadError, match=r"new thread, which .* Raise the limit"):
            crew.submit(niceness)
    done = crew.submit(lambda: 1)
    crew.close()
    assert done.wait(5), "nobody does it"
    assert done.result() == 1


def test_work_handed_in_before_the_end_of_the_program_is_done() -> None:
    code = """
import time
from keepstep.checkpoint.crew import Crew
crew = Crew(1, "test")
crew.submit(lambda: (time.sleep(0.3), crew.submit(lambda: (print("done", flush=True), crew.close()))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "done\n"


def test_ctrl_c_ends_what_several_threads_do_and_none_is_left() -> None:
    stopped, began = Latch(), time.monotonic()

    def wait() -> None:
        stopped.wait(30)

    with ctrl_c_after(0.2), pytest.raises(KeyboardInterrupt):
        in_threads(wait, 3, name="keepstep-test", stop=stopped.open)
    assert time.monotonic() - began < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("keepstep-test")]


def test_ctrl_c_while_a_checkpoint_is_read_lets_nobody_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w{n}": torch.full((4096,), float(n)) for n in range(400)}
    store = Store(tmp_path)
    saved = store.save(state)
    real = _LocalFile.read_into

    def read_slowly(*args: Any) -> int:
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(_LocalFile, "read_into", read_slowly)
    began = time.monotonic()
    with ctrl_c_after(0.5), pytest.raises(KeyboardInterrupt):
        saved.load_into({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("keepstep-read")]
