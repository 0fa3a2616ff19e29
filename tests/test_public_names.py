"""The public surface, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import accelerate
import pytest

import keepstep

PUBLIC_NAMES = [
    "Accelerator",
    "AutocastKwargs",
    "Checkpoint",
    "CheckpointPolicy",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "InitProcessGroupKwargs",
    "PartialState",
    "PendingSave",
    "ProfileKwargs",
    "ProjectConfiguration",
    "Retention",
    "Store",
    "__version__",
    "cpu_offload",
    "cpu_offload_with_hook",
    "dcp",
    "debug_launcher",
    "disk_offload",
    "dispatch_model",
    "find_executable_batch_size",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "is_rich_available",
    "load",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "notebook_launcher",
    "register_codec",
    "save_directory",
    "skip_first_batches",
    "synchronize_rng_states",
]

MAX_IMPORT_S = 0.050
MAX_IMPORT_STARTS = 2.5


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these() -> None:
    assert sorted(keepstep.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(keepstep, name)
    assert name in dir(keepstep)
    if name != "__version__":
        assert value.__doc__
        home = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        assert home.startswith("keepstep.")


def test_what_scripts_import_from_accelerate_itself_is_there() -> None:
    not_supported = {"DeepSpeedPlugin", "ParallelismConfig", "prepare_pippy"}
    theirs = {
        name
        for name, value in vars(accelerate).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert "Accelerator" in theirs
    assert theirs - set(keepstep.__all__) == not_supported


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Accelerater'; it has: .*Accelerator"):
        keepstep.Accelerater  # noqa: B018


@pytest.mark.parametrize(
    "package",
    [
        "keepstep",
        "keepstep.tune",
        "keepstep.tune.logger",
        "keepstep.tune.reporting",
        "keepstep.tune.schedulers",
        "keepstep.tune.search",
        "keepstep.utils",
    ],
)
def test_type_checkers_see_the_names_that_are_imported_when_asked_for(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    imports = [
        (f"{node.module}.{alias.name}", alias.asname)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("keepstep.")
        for alias in node.names
    ]
    seen = {name: home for home, name in imports if name is not None}
    assert set(seen) == set(module.__all__) - {"__version__"}
    for name, home in seen.items():
        value = getattr(module, name)
        above, _, last = home.rpartition(".")
        assert value is getattr(importlib.import_module(above), last), name


def test_importing_keepstep_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, keepstep\nprint(*sys.modules)").split()
    assert not {"torch", "numpy", "safetensors", "rich", "click"} & set(loaded)


def test_a_star_import_brings_the_public_names_and_leaves_the_process_as_it_was() -> None:
    names = run_python(
        "import os, signal, sys, threading\n"
        "import torch.distributed\n"
        "def snapshot():\n"
        "    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]\n"
        "    rng = torch.default_generator.get_state().tolist()\n"
        "    return dict(os.environ), handlers, threading.active_count(), sys.excepthook, rng, "
        "torch.distributed.is_initialized(), torch.save, torch.load, torch.optim.Optimizer.__init__\n"
        "before = snapshot()\n"
        "brought = {}\n"
        "exec('from keepstep import *', brought)\n"
        "assert snapshot() == before\n"
        "print(*sorted(brought.keys() - {'__builtins__'}))\n"
    )
    assert names.split() == sorted(PUBLIC_NAMES)


def test_importing_keepstep_is_quick() -> None:
    """In processor time, beside the interpreter's own start: what slows the machine slows both alike."""
    code = "from time import process_time as now\nstart = now()\nimport keepstep\nprint(start, now() - start)"
    starts_s, imports_s = [], []
    for _ in range(12):
        start_s, import_s = map(float, run_python(code).split())
        starts_s.append(start_s)
        imports_s.append(import_s)
        if min(imports_s) < max(MAX_IMPORT_S, MAX_IMPORT_STARTS * min(starts_s)):
            return
    pytest.fail(
        f"`import keepstep` took {min(imports_s):.3f} s at best of {len(imports_s)}, "
        f"the interpreter itself {min(starts_s):.3f} s; allowed: {MAX_IMPORT_S} s, "
        f"or {MAX_IMPORT_STARTS} times the interpreter's start"
    )
