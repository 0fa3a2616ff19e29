"""`keepstep show`: everything that is known about one checkpoint."""

from __future__ import annotations

import fnmatch
import json
import math
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from keepstep.checkpoint.format.manifest import Manifest, TensorEntry
from keepstep.checkpoint.format.parse import read_manifest, read_state
from keepstep.checkpoint.format.source import Place, place_exists, source_of
from keepstep.checkpoint.keeping.catalog import Entry, Problem, problem_of
from keepstep.checkpoint.keeping.refusal import is_refusal, refused
from keepstep.cli.columns import Column, fit, render, render_pairs, wrapped
from keepstep.cli.locate import Found, PlaceParameter, choose, locate
from keepstep.cli.output import Cell, Output, open_output, write_json, write_lines
from keepstep.cli.phrasing import age, compact, counted, exact, human_bytes
from keepstep.cli.saving import describe_saving
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, NoValidCheckpointError

__all__ = ["command"]

_INDENT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """The checkpoint to show.

    Attributes:
        path: its directory.
        manifest: what it says.
        problem: what is wrong, as far as can be seen without reading data.
        tensors: the index by address; None if state.json is damaged.
        parent: the parent's name, if it is in the same store.
    """

    path: Place
    manifest: Manifest
    problem: Problem | None
    tensors: Mapping[str, TensorEntry] | None
    parent: str | None


@dataclass(kw_only=True, slots=True)
class _Sum:
    """Tensors added up; an alias has elements, but no bytes of its own."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0
    dtypes: dict[str, None] = field(default_factory=dict)

    def add(self, tensor: TensorEntry) -> None:
        self.tensors += 1
        self.elements += math.prod(tensor.shape)
        self.bytes += tensor.bytes
        self.dtypes[tensor.dtype] = None


@click.command(
    name="show",
    short_help="Show everything that is known about one checkpoint.",
    epilog="\b\nExit codes:\n  0  shown\n  2  wrong usage, nothing found, or not readable",
)
@click.argument("path", type=PlaceParameter(), default=".")
@click.argument("name", required=False)
@click.option(
    "--tensors",
    "pattern",
    is_flag=False,
    flag_value="*",
    metavar="[PATTERN]",
    help="List the tensors instead: all, or those below an address (model/h.0), or that match a shell "
    "pattern ('*.bias'). Write it after PATH.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(path: Path | str, name: str | None, pattern: str | None, as_json: bool) -> None:
    """Show everything that is known about one checkpoint.

    PATH is a store, a project directory that holds checkpoints/, or one checkpoint; default: the current
    directory. NAME picks a checkpoint of a store (checkpoint_12, or 12); default: the newest valid one. Its
    data is not read; `keepstep verify` reads it.
    """
    subject = _subject(locate(path), name)
    if pattern is not None and subject.tensors is None:
        reason = subject.problem.reason if subject.problem is not None else "state.json is damaged"
        raise DamagedCheckpointError(subject.path, reason)
    chosen = None if pattern is None else _matching(subject.tensors or {}, pattern)
    output = open_output()
    if as_json:
        write_json(_document(subject, chosen))
    elif chosen is not None:
        write_lines(_tensor_list(chosen, output))
    else:
        write_lines(_sections(subject, output))


# ------------------------------------------------------------------------------------------ choose


def _subject(found: Found, name: str | None) -> _Subject:
    entry = choose(found, [name])[0] if name is not None else _newest_valid(found)
    manifest = entry.manifest or read_manifest(entry.path)
    problem = problem_of(entry)
    tensors = None
    try:
        tensors = read_state(entry.path, manifest).tensors
    except DamagedCheckpointError as error:
        problem = problem or Problem(error.message, is_refusal(error))
    names = {other.manifest.id: other.name for other in found.entries if other.manifest is not None}
    return _Subject(
        path=entry.path,
        manifest=manifest,
        problem=problem,
        tensors=tensors,
        parent=names.get(manifest.parent or ""),
    )


def _newest_valid(found: Found) -> Entry:
    """The one that a resume would take.

    Raises:
        StoreError: it would take none, since the newest can't be read and may well be whole.
    """
    if not found.is_store:
        return found.entries[0]
    gone = 0
    for entry in reversed(found.entries):
        problem = problem_of(entry)
        if problem is None:
            return entry
        if not place_exists(entry.path):  # a training run pruned it while we looked
            gone += 1
            continue
        if problem.refused:
            raise refused(entry.path, problem.reason)
        click.echo(f"passing over {entry.name}, which is damaged: {Cell(problem.reason).text}", err=True)
    is_so = "is damaged; name one to see what is left of it"
    is_so = "was deleted just now; look again" if gone == len(found.entries) else is_so
    raise NoValidCheckpointError(f"every checkpoint in {found.root} {is_so}")


def _matching(tensors: Mapping[str, TensorEntry], pattern: str) -> dict[str, TensorEntry]:
    """Tensors at or below an address, or that match a shell pattern, in the order of the files."""
    below = (f"{pattern}/", f"{pattern}.")
    chosen = {
        address: tensor
        for address, tensor in tensors.items()
        if address == pattern or address.startswith(below) or fnmatch.fnmatchcase(address, pattern)
    }
    if not chosen and tensors:
        some = ", ".join(list(tensors)[:3])
        raise CheckpointNotFoundError(f"no tensor matches {pattern!r}; addresses look like {some}")
    return chosen


def _group_of(address: str) -> str:
    return address.partition("/")[0]


def _sums(tensors: Mapping[str, TensorEntry]) -> tuple[dict[str, _Sum], dict[str, _Sum]]:
    """By group, and by dtype (the largest first)."""
    groups: defaultdict[str, _Sum] = defaultdict(_Sum)
    dtypes: defaultdict[str, _Sum] = defaultdict(_Sum)
    for address, tensor in tensors.items():
        groups[_group_of(address)].add(tensor)
        dtypes[tensor.dtype].add(tensor)
    return dict(groups), dict(sorted(dtypes.items(), key=lambda item: -item[1].bytes))


# -------------------------------------------------------------------------------------------- json


def _document(subject: _Subject, chosen: Mapping[str, TensorEntry] | None) -> dict[str, Any]:
    manifest = subject.manifest
    groups, dtypes = _sums(subject.tensors or {})
    document: dict[str, Any] = {
        "name": source_of(subject.path).name,
        "path": str(subject.path),
        "health": "ok" if subject.problem is None else subject.problem.health,
        "problem": None if subject.problem is None else subject.problem.reason,
        **{
            key: getattr(manifest, key)
            for key in ("id", "created_at", "step", "epoch", "metrics", "tags", "pinned")
        },
        **{key: getattr(manifest, key) for key in ("parent", "run", "attempt", "environment", "bytes")},
        "files": [
            {"name": name, "bytes": entry.bytes, "digest": entry.digest}
            for name, entry in manifest.files.items()
        ],
        "groups": None if subject.tensors is None else [_sum_to_json(*item) for item in groups.items()],
        "dtypes": None if subject.tensors is None else [_sum_to_json(*item) for item in dtypes.items()],
    }
    if chosen is not None:
        document["tensors"] = [_tensor_to_json(*item) for item in chosen.items()]
    return document


def _sum_to_json(name: str, total: _Sum) -> dict[str, Any]:
    return {
        "name": name,
        "tensors": total.tensors,
        "elements": total.elements,
        "bytes": total.bytes,
        "dtypes": list(total.dtypes),
    }


def _tensor_to_json(address: str, tensor: TensorEntry) -> dict[str, Any]:
    keys = ("dtype", "shape", "bytes", "file", "offset", "digest", "alias_of", "stride")
    return {"name": address, **{key: getattr(tensor, key) for key in keys}}


# ----------------------------------------------------------------------------------------- tensors


def _file(tensor: TensorEntry) -> str:
    if tensor.chunks:
        files = len({chunk.file for chunk in tensor.chunks})
        return f"{len(tensor.chunks)} chunks in {files} file{'s' if files > 1 else ''}"
    return tensor.file or "-"


def _tensor_list(tensors: Mapping[str, TensorEntry], output: Output) -> Iterator[str]:
    exactly = output.width is None
    columns = [
        Column(header="name", cells=[Cell(address, "bold") for address in tensors]),
        Column(header="dtype", cells=[Cell(tensor.dtype) for tensor in tensors.values()]),
        Column(header="shape", cells=[Cell(_shape(tensor.shape)) for tensor in tensors.values()]),
        Column(
            header="bytes" if exactly else "size",
            cells=[Cell(_size(tensor.bytes, exactly)) for tensor in tensors.values()],
            right=True,
        ),
        Column(header="file", cells=[Cell(_file(tensor), "dim") for tensor in tensors.values()], rank=1),
    ]
    if exactly or any(tensor.alias_of for tensor in tensors.values()):
        aliases = [Cell(tensor.alias_of or "-", "cyan") for tensor in tensors.values()]
        columns.append(Column(header="alias_of", cells=aliases, rank=2, least=16))
    yield from render(fit(columns, output.width), output)
    total = _Sum()
    for tensor in tensors.values():
        total.add(tensor)
    counts = [
        counted(total.tensors, "tensor"),
        counted(total.elements, "element"),
        _size(total.bytes, exactly),
    ]
    if exactly:
        yield f"# {', '.join(counts)} bytes"
    else:
        yield ""
        yield from wrapped(Cell(" · ".join(counts), "dim"), output, 0)


def _shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _size(size: int, exactly: bool) -> str:
    return str(size) if exactly else human_bytes(size)


# ---------------------------------------------------------------------------------------- sections


def _sections(subject: _Subject, output: Output) -> Iterator[str]:
    manifest = subject.manifest
    health = Cell("ok", "green") if subject.problem is None else Cell(subject.problem.health, "bold red")
    yield f"{output.paint(Cell(source_of(subject.path).name, 'bold'))}  {output.paint(health)}"
    yield from wrapped(Cell(str(subject.path), "dim"), output, 0)
    if subject.problem is not None:
        yield from wrapped(Cell(subject.problem.reason, "red"), output, 0)
    yield ""
    yield from render_pairs(_what(manifest, output), output, indent=_INDENT)
    number = exact if output.width is None else compact
    metrics = [(name, Cell(number(value), "bold")) for name, value in manifest.metrics.items()]
    yield from _section("metrics", render_pairs(metrics, output, indent=_INDENT), output)
    yield from _section("origin", render_pairs(_origin(subject), output, indent=_INDENT), output)
    saving = [(name, Cell(text)) for name, text in describe_saving(manifest.environment)]
    yield from _section("saving", render_pairs(saving, output, indent=_INDENT), output)
    rest = {name: v for name, v in manifest.environment.items() if name != "saving" or not saving}
    environment = [(name, Cell(text)) for name, text in _environment(rest)]
    yield from _section("environment", render_pairs(environment, output, indent=_INDENT), output)
    yield from _section("files", _files(manifest, output), output)
    if subject.tensors:
        groups, dtypes = _sums(subject.tensors)
        yield from _section("tensors by group", _sum_table("group", groups, output), output)
        yield from _section("tensors by dtype", _sum_table("dtype", dtypes, output), output)


def _section(title: str, lines: Iterator[str], output: Output) -> Iterator[str]:
    """A title and its lines; nothing if there are none."""
    for place, line in enumerate(lines):
        if place == 0:
            yield ""
            yield output.paint(Cell(title, "cyan"))
        yield line


def _what(manifest: Manifest, output: Output) -> list[tuple[str, Cell]]:
    created = manifest.created_at
    if output.width is not None:
        ago = age(created, datetime.now(UTC))
        created += f" ({ago})" if ago.endswith("ago") else ""
    size = _size(manifest.bytes, exactly=output.width is None)
    return [
        ("step", Cell("-" if manifest.step is None else str(manifest.step), "bold")),
        ("epoch", Cell("-" if manifest.epoch is None else str(manifest.epoch))),
        ("created", Cell(created)),
        (
            "size",
            Cell(
                f"{size}{' bytes' if output.width is None else ''} in {counted(len(manifest.files), 'file')}"
            ),
        ),
        ("tags", Cell(", ".join(manifest.tags) or "-", "cyan")),
        ("pinned", Cell("yes" if manifest.pinned else "no")),
    ]


def _origin(subject: _Subject) -> list[tuple[str, Cell]]:
    manifest = subject.manifest
    parent = manifest.parent or "-"
    return [
        ("id", Cell(manifest.id)),
        ("parent", Cell(f"{parent} ({subject.parent})" if subject.parent else parent)),
        ("run", Cell(manifest.run)),
        ("attempt", Cell(str(manifest.attempt))),
    ]


def _environment(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values as text; where they came from first, then the versions."""
    for name in sorted(environment, key=lambda name: name not in ("host", "command", "git")):
        value = environment[name]
        if name == "command" and isinstance(value, list):
            yield name, shlex.join(map(str, value))
        elif name == "git" and isinstance(value, dict) and isinstance(value.get("commit"), str):
            dirty = " with uncommitted changes" if value.get("dirty") is True else ""
            yield name, value["commit"] + dirty
        elif name == "log" and isinstance(value, dict):
            yield name, _place_in_log(value)
        else:
            yield name, value if isinstance(value, str) else "-" if value is None else json.dumps(value)


def _place_in_log(log: Mapping[str, Any]) -> str:
    """How far the run's log had come."""
    parts = [f"{log['offset']} bytes"] if isinstance(log.get("offset"), int) else []
    parts += [f"{name} {log[name]}" for name in ("run", "attempt") if name in log]
    return ", ".join(parts) or "-"


def _files(manifest: Manifest, output: Output) -> Iterator[str]:
    exactly = output.width is None
    columns = [
        Column(header="name", cells=[Cell(name) for name in manifest.files]),
        Column(
            header="bytes" if exactly else "size",
            cells=[Cell(_size(entry.bytes, exactly)) for entry in manifest.files.values()],
            right=True,
        ),
        Column(header="xxh3_128", cells=[Cell(e.digest, "dim") for e in manifest.files.values()], rank=1),
    ]
    room = None if output.width is None else output.width - _INDENT
    yield from render(fit(columns, room), output, indent=_INDENT)


def _sum_table(what: str, sums: Mapping[str, _Sum], output: Output) -> Iterator[str]:
    exactly = output.width is None
    totals = list(sums.values())

    def numbers(header: str, texts: Iterator[str], rank: int) -> Column:
        return Column(header=header, cells=[Cell(text) for text in texts], right=True, rank=rank)

    grouped = "" if exactly else ","
    columns = [
        Column(header=what, cells=[Cell(name) for name in sums]),
        numbers("tensors", (f"{total.tensors:{grouped}}" for total in totals), 2),
        numbers("elements", (f"{total.elements:{grouped}}" for total in totals), 1),
        numbers("bytes" if exactly else "size", (_size(total.bytes, exactly) for total in totals), 0),
    ]
    if what != "dtype":
        dtypes = [Cell(",".join(total.dtypes), "dim") for total in totals]
        columns.append(Column(header="dtypes", cells=dtypes, rank=3))
    room = None if output.width is None else output.width - _INDENT
    yield from render(fit(columns, room), output, indent=_INDENT)
