"""`keepstep estimate-memory`: how much memory a model takes, to run and to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from keepstep.cli.output import write_json, write_lines
from keepstep.cli.phrasing import human_bytes
from keepstep.models.estimate import DTYPES, Estimate, count_elements, estimate

__all__ = ["command"]


@click.command(
    name="estimate-memory",
    short_help="Say how much memory a model takes, to run and to train.",
    epilog="\b\nExit codes:\n  0  done\n  2  wrong usage, nothing found, or not readable",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dtypes", multiple=True, metavar="NAMES", help=f"With commas; default: {','.join(DTYPES)}.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(path: Path, dtypes: Sequence[str], as_json: bool) -> None:
    """Say how much memory a model takes, to run and to train.

    PATH is a .safetensors file, or a directory with such files, or one with a config.json that transformers
    understands. Training is with Adam: weights, gradients and Adam's averages, without activations; float16
    and bfloat16 are mixed precision. Nothing is downloaded.
    """
    wanted = [name for names in dtypes for name in names.split(",") if name] or list(DTYPES)
    elements = count_elements(path)
    rows = [estimate(elements, dtype) for dtype in wanted]
    if as_json:
        document = {"path": str(path), "parameters": sum(elements.values())}
        write_json(document | {"dtypes": [asdict(row) for row in rows]})
        return
    write_lines([f"{sum(elements.values()):,} numbers in {len(elements)} tensors", "", *_table(rows)])


def _table(rows: Sequence[Estimate]) -> list[str]:
    cells = [("dtype", "largest layer", "total", "training with Adam")]
    cells += [
        (
            row.dtype,
            human_bytes(row.largest_layer),
            human_bytes(row.total),
            "-" if row.training is None else human_bytes(row.training),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = []
    for first, *others in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return lines
