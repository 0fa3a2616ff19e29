"""The process of a trial: connects it to the driver, makes it at home, runs it, and ends."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from keepstep.checkpoint.place.registry import open_objects
from keepstep.errors import KeepstepError
from keepstep.tune.executors.channel import make_working_dir, remove_if_empty
from keepstep.tune.executors.environment import changes_directory, put
from keepstep.tune.executors.protocol import Event, Failed, Job, Order
from keepstep.tune.executors.shipping import loads
from keepstep.tune.executors.wire import frame, read_frame, text_of
from keepstep.tune.executors.worker import describe, run_job
from keepstep.tune.trainable.session import TrialStopped

__all__ = ["MODULES", "Errand", "Home", "Loaded", "not_made", "run_trial"]

_log = logging.getLogger(__name__)

MODULES: Final = "modules"
"""What a frame is called that names modules."""

_WORTH_SHARING: Final = ("numpy", "pandas", "scipy", "sklearn", "torch")
"""Libraries that take long to import, and that a process may import before it forks."""


class Errand(NamedTuple):
    """What the driver sends to a trial's process.

    Attributes:
        order: an order; at first a job.
        directory: where a new job runs; "": there is none in the order.
    """

    order: Order | Job
    directory: str = ""


class Loaded(NamedTuple):
    """The trainable, or why there is none.

    Attributes:
        trainable: the function or class.
        error: what was raised when it was made out of its bytes.
        modules: those that were there before any trial ran.
    """

    trainable: Any
    error: BaseException | None
    modules: frozenset[str]


class _Channel:
    """To the driver; `keepstep.tune.executors.channel.Channel`."""

    def __init__(self, connection: socket.socket, place: Home) -> None:
        self._connection = connection
        self._place = place
        self._pid = os.getpid()

    def send(self, event: Event) -> None:
        self._put(text_of(event))

    def tell_modules(self, names: list[str]) -> None:
        """Which libraries other trials need not import again, if they are there before a fork."""
        self._put(json.dumps([MODULES, names]).encode())

    def _put(self, data: bytes) -> None:
        if os.getpid() != self._pid:
            os._exit(1)  # a process that the trial's code forked came to the end of it
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is there to be told
            self._connection.sendall(frame(data))

    def receive(self) -> Order:
        order = self.receive_errand().order
        assert not isinstance(order, Job)
        return order

    def receive_errand(self) -> Errand:
        """Wait for what comes."""
        try:
            data = read_frame(self._connection)
        except ConnectionResetError:
            data = None
        if data is None:
            raise TrialStopped  # the driver is gone
        errand: Errand = loads(data)
        if errand.directory:
            self._place.directory = errand.directory
        return errand


class Home:
    """Where a process's trials run, one after another; `keepstep.tune.executors.channel.Place`.

    Attributes:
        directory: the trial's, of the next job that is entered; of one in a bucket: what stands in for it.
    """

    def __init__(self) -> None:
        self.directory = ""
        self._working_dir = ""
        self._outputs: tuple[Job, list[str]] | None = None
        self._undo: dict[str, str | None] = {}
        self._places: dict[str, str] = {}

    @property
    def working_dir(self) -> str:
        return self._working_dir

    @property
    def pid(self) -> int:
        return os.getpid()

    def enter(self, job: Job) -> None:
        """Be the place of this job: its directory, environment and output."""
        self.leave()
        self.directory = self._places.setdefault(job.run, self.directory)
        put(self._undo)
        self._undo = put(job.env)
        self._working_dir = make_working_dir(self.directory)
        names = []
        for path, stream, number in ((job.stdout, sys.stdout, 1), (job.stderr, sys.stderr, 2)):
            if path is not None:
                name = path.removeprefix(f"{job.path}/")
                names.append(name)
                _redirect(os.path.join(self.directory, name), stream, number)
        self._outputs = (job, names) if "://" in job.path else None
        if changes_directory():
            os.chdir(self._working_dir)

    def leave(self) -> None:
        """The job that was entered last is over: what it printed goes where its files are."""
        if self._working_dir and remove_if_empty(self._working_dir) and changes_directory():
            os.chdir(os.path.dirname(self._working_dir))
        if self._outputs is None:
            return
        (job, names), self._outputs = self._outputs, None
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        try:
            _upload(job, Path(self.directory), names)
        except (KeepstepError, OSError) as error:
            _log.warning("what %s printed could not be uploaded: %s", job.trial_name, error)


def _upload(job: Job, directory: Path, names: list[str]) -> None:
    """Append what a job printed to what earlier starts of its trial did."""
    objects = open_objects(job.path, job.storage_options)
    for name in names:
        data = (directory / name).read_bytes()
        if data:
            with contextlib.suppress(FileNotFoundError):
                data = objects.get(name) + data
            objects.put(name, data)
            os.truncate(directory / name, 0)


def _flush(stream: TextIO) -> None:
    """Write what a stream holds back, if it can: trials close and replace them, and disks are full."""
    with contextlib.suppress(Exception):
        stream.flush()


def _redirect(path: str, stream: TextIO, number: int) -> None:
    """Have what goes to a standard stream go to a file, line by line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _flush(stream)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, number)
    os.close(file)
    if isinstance(stream, io.TextIOWrapper) and not stream.closed:
        stream.reconfigure(line_buffering=True)


def run_trial(connection: socket.socket, run: str, loaded: Loaded) -> None:
    """Run what the driver sends over a connection, and end the process.

    Args:
        connection: to the driver.
        run: the job's, for what goes wrong before it is known.
        loaded: the trainable.
    """
    home = Home()
    channel = _Channel(connection, home)
    try:
        if loaded.error is not None:
            raise loaded.error
        job = channel.receive_errand().order
        assert isinstance(job, Job)
    except TrialStopped:
        os._exit(1)
    except BaseException as error:  # noqa: BLE001 - importing the user's modules may raise anything
        channel.send(not_made(run, error))
    else:
        run_job(job, loaded.trainable, channel, home)
        home.leave()
        channel.tell_modules(_news(loaded.modules))
    _end()


def not_made(run: str, error: BaseException) -> Failed:
    """The failure of a trial whose function, class or configuration could not be loaded."""
    found = describe(run, error)
    said = (
        f"The trainable or the configuration could not be made anew in the trial's process: {found.error}. "
        "What they import must be importable there, from the same sys.path"
    )
    return Failed(run=run, error=said, traceback=found.traceback)


def _news(before: frozenset[str]) -> list[str]:
    """Modules that this trial loaded, and that are worth to be there before the next is forked."""
    worth = {
        name
        for name in sys.modules
        if name.startswith("keepstep.")
        or (
            name.partition(".")[0] in _WORTH_SHARING and name.count(".") <= 1
        )  # torch._dynamo: an optimizer's
    }
    return sorted(worth - before)


def _end() -> None:
    """End the process as if a script had come to its end, but for threads that still run."""
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(0)
