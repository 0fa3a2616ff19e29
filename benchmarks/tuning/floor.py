"""The same work by hand, `python floor.py - JSON`: a bare process for each trial, files, and nothing else.

Takes what `trials.py` takes. A checkpoint is written, brought to the disk and renamed; the one before goes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any


def save(payload: bytearray, directory: Path, number: int) -> None:
    for at in range(0, len(payload), 4096):
        payload[at : at + 8] = (number + 1).to_bytes(8)
    unfinished = directory / f"unfinished_{number:06d}"
    unfinished.mkdir()
    with (unfinished / "model.bin").open("wb") as file:
        file.write(payload)
        os.fsync(file.fileno())
    unfinished.rename(directory / f"checkpoint_{number:06d}")
    if number:
        shutil.rmtree(directory / f"checkpoint_{number - 1:06d}")


def trial(connection: Connection, index: int, directory: Path, told: dict[str, Any]) -> None:
    payload = bytearray(os.urandom(told["checkpoint_bytes"]))
    for number in range(told["reports"]):
        time.sleep(told["step_s"])
        if payload:
            save(payload, directory, number)
        connection.send({"loss": index + number, "number": number})
        connection.recv()
    connection.send(None)


def main(told: dict[str, Any]) -> None:
    context = multiprocessing.get_context("forkserver")
    imported = time.time()
    waiting, first = list(range(told["trials"])), None
    live: dict[Any, tuple[Any, IO[str]]] = {}
    while waiting or live:
        while waiting and len(live) < 2:
            connection, process, file = _start(context, waiting.pop(0), told)
            live[connection] = (process, file)
        for heard in list[Any](wait(list(live))):
            said = heard.recv()
            process, file = live[heard]
            if said is None:
                process.join()
                file.close()
                del live[heard]
                continue
            first = first or time.time()
            file.write(json.dumps(said) + "\n")
            file.flush()
            heard.send("go on")
    assert first is not None
    marks = {"imported": imported, "first": first, "fitted": time.time()}
    print("MARKS", json.dumps({name: at - told["began"] for name, at in marks.items()}))


def _start(context: Any, index: int, told: dict[str, Any]) -> tuple[Connection, Any, IO[str]]:
    directory = Path(told["directory"], f"trial_{index:05d}")
    directory.mkdir()
    ours, theirs = context.Pipe()
    process = context.Process(target=trial, args=(theirs, index, directory, told))
    process.start()
    theirs.close()
    return ours, process, (directory / "result.json").open("a")


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
