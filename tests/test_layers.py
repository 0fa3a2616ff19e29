"""What lint-imports and ruff cannot see: what a fresh process loads, and who may use which banned name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keepstep

PACKAGE = Path(keepstep.__file__).parent

TORCH_FREE = [
    "keepstep",
    "keepstep.errors",
    "keepstep.files",
    "keepstep.keystore",
    "keepstep.lazy",
    "keepstep.locks",
    "keepstep.logins",
    "keepstep.meetings",
    "keepstep.pages",
    "keepstep.patching",
    "keepstep.checkpoint.format.manifest",
    "keepstep.checkpoint.keeping.catalog",
    "keepstep.checkpoint.keeping.preflight",
    "keepstep.checkpoint.keeping.pruning",
    "keepstep.checkpoint.keeping.quarantine",
    "keepstep.checkpoint.keeping.refusal",
    "keepstep.checkpoint.keeping.retention",
    "keepstep.checkpoint.keeping.scrub",
    "keepstep.checkpoint.keeping.verify",
    "keepstep.checkpoint.mirror",
    "keepstep.checkpoint.pulling",
    "keepstep.checkpoint.place.in_use",
    "keepstep.checkpoint.place.objects",
    "keepstep.checkpoint.place.registry",
    "keepstep.checkpoint.unmirrored",
    "keepstep.checkpoint.upkeep",
    "keepstep.checkpoint.uploading",
    "keepstep.checkpoint.uploads",
    "keepstep.cli.launch",
    "keepstep.cli.main",
    "keepstep.logging",
    "keepstep.track",
    "keepstep.track.adapters.csv",
    "keepstep.track.adapters.jsonl",
    "keepstep.track.bars",
    "keepstep.track.trackers",
    "keepstep.tracking",
    "keepstep.tune",
    "keepstep.tune.checkpoint",
    "keepstep.tune.experiment.bucket_log",
    "keepstep.tune.experiment.keeping",
    "keepstep.tune.experiment.removal",
    "keepstep.tune.executors.actor",
    "keepstep.tune.executors.inline",
    "keepstep.tune.executors.local",
    "keepstep.tune.executors.ray",
    "keepstep.tune.executors.server",
    "keepstep.tune.saving",
    "keepstep.tune.driver.driver",
    "keepstep.tune.experiment.history",
    "keepstep.tune.experiment.journal",
    "keepstep.tune.search.basic_variant",
    "keepstep.tune.search.concurrency_limiter",
    "keepstep.tune.search.create",
    "keepstep.tune.search.optuna",
    "keepstep.tune.search.repeater",
    "keepstep.tune.search.sample",
    "keepstep.tune.search.tag",
    "keepstep.tune.analysis",
    "keepstep.tune.logger.callback",
    "keepstep.tune.reporting.choosing",
    "keepstep.tune.reporting.echo",
    "keepstep.tune.reporting.live",
    "keepstep.tune.logger.tensorboard",
    "keepstep.tune.schedulers.pb2",
    "keepstep.tune.schedulers.pbt_replay",
    "keepstep.tune.settings",
    "keepstep.tune.stopper",
    "keepstep.tune.registry",
    "keepstep.tune.trainable",
]

# ruff can lift its ban on names (TID251) for a whole file only, so here is who may use what.
ALLOWED_IN = {
    "torch.distributed": {
        "world/",
        "train/ranks/parallel.py",
        "train/ranks/shards.py",
        "checkpoint/dcp/",
        "launch/elastic.py",
    }
    | {"checkpoint/convert/dcp_files.py"},
    # A profile is asked for in the environment of whoever looks at a bucket, the command line included.
    "os.environ": {
        "train/settings/environment.py",
        "track/here.py",
        "patching.py",
        "checkpoint/place/profile.py",
        "launch/environment.py",
        "tune/executors/environment.py",
        "tune/assembly/environment.py",
    },
    "os.getenv": {"train/settings/environment.py"},
    "os.putenv": set(),
    "pickle": {"checkpoint/convert/", "tune/executors/shipping.py"},
    "cloudpickle": {"tune/executors/shipping.py"},
    "torch.load": {"checkpoint/convert/"},
    "torch.save": set(),
}


def test_looking_at_checkpoints_never_imports_torch() -> None:
    """A static check misses what a parent package's `__init__` pulls in; a fresh process does not.

    One process for all: what none of them has loaded by the end, none loads. The first that does is named.
    """
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTING, *TORCH_FREE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


_IMPORTING = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    loaded = {"torch", "safetensors", "accelerate", "keepstep.train"} & set(sys.modules)
    assert not loaded, f"{module} loads {loaded}"
"""


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` as text, None for what is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)) is not None:
        return f"{left}.{node.attr}"
    return None


def names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each dotted name that a module imports or reads from one it imports, with its line."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                origins[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)) is not None:
            head, _, rest = name.partition(".")
            if head in origins:
                yield node.lineno, f"{origins[head]}.{rest}"


def misuses(source: str, file: str) -> list[str]:
    """Banned names that `file` uses without being allowed to."""
    found = []
    for line, name in names_used(ast.parse(source)):
        for banned, allowed in ALLOWED_IN.items():
            if (name == banned or name.startswith(f"{banned}.")) and not file.startswith(tuple(allowed)):
                found.append(f"{file}:{line}: {name}")
        if name.startswith("keepstep.") and name.count(".") == 1 and name.split(".")[1] in keepstep.__all__:
            lazily = name != "keepstep.__version__" and file != "__init__.py"
            found += [f"{file}:{line}: {name} (import it from its own module)"] if lazily else []
    return sorted(set(found))


def test_banned_names_stay_where_they_are_allowed() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 5
    found = [m for path in files for m in misuses(path.read_text(), path.relative_to(PACKAGE).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "file", "is_misuse"),
    [
        ("import torch.distributed as dist", "train/resuming/state.py", True),
        ("import torch.distributed as dist\ndist.barrier()", "world/ranks.py", False),
        ("import torch\ntorch.distributed.barrier()", "train/resuming/state.py", True),
        ("from torch import distributed", "checkpoint/store.py", True),
        ("import os\nos.environ['A'] = '1'", "world/ranks.py", True),
        ("import os\nos.environ.get('A')", "train/settings/environment.py", False),
        ("from os import environ as e", "files.py", True),
        ("from pickle import loads", "train/build.py", True),
        ("import torch as t\nt.load('x')", "checkpoint/convert/torch_save.py", False),
        ("import torch as t\nt.load('x')", "checkpoint/loading/reader.py", True),
        ("from keepstep import Store", "cli/main.py", True),
        ("from keepstep import __version__", "cli/main.py", False),
    ],
)
def test_the_check_itself_sees_misuse(source: str, file: str, is_misuse: bool) -> None:
    assert bool(misuses(source, file)) is is_misuse
