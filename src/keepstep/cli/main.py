"""The group `keepstep`: which commands there are, and how any of them fails."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib import import_module
from typing import Any, Final

import click

from keepstep import __version__
from keepstep.cli.phrasing import printable
from keepstep.errors import KeepstepError

__all__ = ["main"]

SECTIONS: Final = {
    "Look at checkpoints": {
        "ls": "List the checkpoints of a store.",
        "show": "Show everything that is known about one checkpoint.",
        "verify": "Read checkpoints whole and say whether every byte is what was committed.",
    },
    "Look at trials": {
        "tune": "List experiments and trials, show one, find the best.",
    },
    "Start training": {
        "config": "Answer questions once; `keepstep launch` reads the answers.",
        "env": "Say what runs here: versions, devices, configuration.",
        "launch": "Start a training script, on one process or many.",
        "test": "Try a short training on the processes of a launch.",
    },
    "Models": {
        "estimate-memory": "Say how much memory a model takes, to run and to train.",
        "merge-weights": "Write the model of a checkpoint as safetensors files.",
    },
}
SUMMARIES: Final = {name: words for section in SECTIONS.values() for name, words in section.items()}
"""Name -> first line of its help; `keepstep --help` imports no command."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141
"""What a shell reports for a program that SIGINT or SIGPIPE ended."""


class _LazyGroup(click.Group):
    """Imports a command when it is called for, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        command: click.Command = import_module(f"keepstep.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))

    def invoke(self, ctx: click.Context) -> Any:
        _never_fail_on_encoding()
        try:
            try:
                return super().invoke(ctx)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            _drop_output()
            ctx.exit(_BROKEN_PIPE)
        except KeepstepError as error:
            _fail(ctx, str(error))
        except OSError as error:
            place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            _fail(ctx, f"{place}{error.strerror or error}")


def _never_fail_on_encoding() -> None:
    """A terminal that can't show a character gets its escape, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """The reader has gone; keep the interpreter from failing again when it flushes at exit."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fail(ctx: click.Context, message: str) -> None:
    click.echo(f"keepstep: {printable(message)}", err=True)
    ctx.exit(2)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExit codes:\n"
    "  0  done; for verify: all sound\n"
    "  1  verify: something is damaged, or all checkpoints were set aside as damaged\n"
    "  2  wrong usage, nothing found, or not readable\n"
    "  N  launch: the script's own",
)
@click.version_option(__version__, message="keepstep %(version)s")
def main() -> None:
    """Start training, and look at the checkpoints that it saved.

    Looking changes nothing. PATH is a store (a directory of checkpoint_N), a project directory that holds
    checkpoints/, or one checkpoint.
    """
