"""The real program: through pipes, and on a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

PROGRAM = [sys.executable, "-c", "from keepstep.cli.main import main; main(prog_name='keepstep')"]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(*arguments: str | Path | bytes, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd
    )


def on_terminal(*arguments: str | Path, width: int, environment: dict[str, str] | None = None) -> str:
    """Everything that reaches a terminal of `width` columns, escape sequences included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=inherited | {"TERM": "xterm-256color"} | (environment or {}),
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            more = os.read(master, 65536)
        except OSError:  # Linux says EIO when the last writer has gone
            break
        if not more:
            break
        seen += more
    os.close(master)
    process.wait(60)
    return seen.decode()


def without_styles(text: str) -> str:
    """What is left without colours; only sequences that rich writes are taken out."""
    return _ESCAPES.sub("", text).replace("\r", "")
