"""What will be started, and how: decided purely from settings, options and facts about the machine.

`LaunchPlan` is a value that tests look at; `keepstep.launch.runner` carries it out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from keepstep.errors import UsageError
from keepstep.launch.refusals import refuse_what_is_missing
from keepstep.launch.restarts import Restarts
from keepstep.launch.settings import Settings

__all__ = [
    "DEFAULT_PORT",
    "LaunchPlan",
    "Machine",
    "Manner",
    "Rendezvous",
    "Script",
    "override",
    "plan_launch",
]

DEFAULT_PORT: Final = 29500
_HERE: Final = "127.0.0.1"


class Machine(Protocol):
    """Facts about this machine, asked for only when they matter."""

    @property
    def gpus(self) -> int:
        """GPUs that PyTorch can use, those hidden by the environment not counted."""
        ...

    @property
    def cpus(self) -> int:
        """Processors that this process may use."""
        ...

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment."""
        ...

    def is_free(self, port: int) -> bool:
        """Whether a process could listen on this port."""
        ...


@dataclass(frozen=True, kw_only=True)
class Script:
    """What is run.

    Attributes:
        target: a file, or a module's name, or a program.
        arguments: what it is given.
        kind: "file", "module" (`python -m`) or "program" (no Python in front).
    """

    target: str
    arguments: Sequence[str] = ()
    kind: str = "file"

    @property
    def command(self) -> tuple[str, ...]:
        """The command line of a rank; Python's output is not held back, so a killed rank's is not lost."""
        python = {"file": (sys.executable, "-u"), "module": (sys.executable, "-u", "-m"), "program": ()}
        return (*python[self.kind], self.target, *self.arguments)


@dataclass(frozen=True, kw_only=True)
class Manner:
    """What has no place in a configuration file.

    Attributes:
        cpu_threads: threads of each process; None leaves it to OMP_NUM_THREADS, or divides the processors.
        restarts: when failed ranks are started again.
        monitor_interval_s: how often ranks are looked at.
        rdzv_conf: more for the rendezvous, by name.
        role: name of the ranks in the prefix of `tee`.
        tee: as for torchrun: "3" copies each rank's output into files and prefixes it; None doesn't touch it.
        log_dir: directory of those files.
        wants_gpus: no CPU in their stead.
    """

    cpu_threads: int | None = None
    restarts: Restarts = field(default_factory=Restarts)
    monitor_interval_s: float = 0.1
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    role: str = "rank"
    tee: str | None = None
    log_dir: str | None = None
    wants_gpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """How the ranks find each other.

    Attributes:
        backend: of torchrun.
        endpoint: host and port; port 0 for one that is free.
        run_id: the same on all machines; None for a fresh one.
        conf: more for the backend.
    """

    backend: str
    endpoint: str
    run_id: str | None = None
    conf: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What is started on this machine.

    Attributes:
        command: the command line of every rank.
        environment: variables that every rank gets beside those of this process.
        processes: ranks on this machine.
        machines: machines.
        machine_rank: this one's number.
        device: "cpu", "gpu", or "any" if a single process finds out by itself.
        rendezvous: None for a single process, which needs none.
        manner: how they are watched.
        notes: what a user should know before it starts.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    processes: int
    machines: int
    machine_rank: int
    device: str
    rendezvous: Rendezvous | None
    manner: Manner
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line that tells what is started."""
        ranks = f"{self.processes} process{'' if self.processes == 1 else 'es'}"
        place = {"cpu": " on the CPU", "gpu": " on GPUs", "any": ""}[self.device]
        many = f", machine {self.machine_rank} of {self.machines} (from 0)" if self.machines > 1 else ""
        return f"{ranks}{place}{many}"


def override(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings with the options that were given (are not None) in place of the file's.

    Options of a section (`fsdp_*`, `dynamo_*`) replace single entries of it.
    """
    told = {name: value for name, value in given.items() if value is not None}
    sections: dict[str, Any] = {
        f"{prefix}_config": {
            **getattr(settings, f"{prefix}_config"),
            **{name: str(told.pop(name)) for name in sorted(told) if name.startswith(f"{prefix}_")},
        }
        for prefix in ("dynamo", "fsdp")
    }
    return replace(settings, **told, **sections)


def plan_launch(settings: Settings, script: Script, manner: Manner, machine: Machine) -> LaunchPlan:
    """Decide what is started on this machine.

    Raises:
        UsageError: settings that contradict each other or this machine, or ask for what keepstep has not.
    """
    refuse_what_is_missing(settings)
    _check_machines(settings)
    device = _device(settings, manner, machine)
    total = _processes(settings, device, machine)
    here = total // settings.num_machines
    if device == "gpu" and here > 1:
        _check_gpus(here, settings, machine)
    notes = []
    if device == "cpu" and not settings.use_cpu:
        notes.append("This machine has no GPU that PyTorch can use, so training is on the CPU.")
    return LaunchPlan(
        command=script.command,
        environment=_environment(settings, manner, machine, device=device, here=here),
        processes=here,
        machines=settings.num_machines,
        machine_rank=settings.machine_rank,
        device=device,
        rendezvous=_rendezvous(settings, manner, machine) if total > 1 or _copies(manner) else None,
        manner=manner,
        notes=tuple(notes),
    )


def _copies(manner: Manner) -> bool:
    """Whether output is copied, which torch's agent does, for a single process too."""
    return manner.tee not in (None, "0")


def _check_machines(settings: Settings) -> None:
    if settings.machine_rank >= settings.num_machines:
        raise UsageError(
            f"machine_rank is {settings.machine_rank}, num_machines {settings.num_machines}; machines count "
            f"from 0 to {settings.num_machines - 1}."
        )
    if settings.num_machines > 1 and settings.main_process_ip is None:
        raise UsageError(
            f"num_machines is {settings.num_machines} and main_process_ip is not said. Give the address of "
            "the machine of rank 0, the same on each machine: --main_process_ip 10.0.0.1"
        )
    total = settings.num_processes
    if total is not None and total % settings.num_machines:
        raise UsageError(
            f"num_processes is {total}, num_machines {settings.num_machines}; it counts the processes of all "
            "machines, so it must be a multiple of them."
        )


def _device(settings: Settings, manner: Manner, machine: Machine) -> str:
    if settings.use_cpu or settings.distributed_type == "MULTI_CPU":
        if manner.wants_gpus:
            raise UsageError(
                "The CPU (--cpu, or use_cpu in the file) and --multi_gpu were both asked for. Leave one out."
            )
        return "cpu"
    wants_gpus = (
        manner.wants_gpus or settings.distributed_type == "MULTI_GPU" or settings.gpu_ids not in (None, "all")
    )
    if wants_gpus and not machine.gpus:
        why = "--multi_gpu" if manner.wants_gpus else "gpu_ids or distributed_type MULTI_GPU"
        raise UsageError(
            f"GPUs were asked for ({why}), and this machine has none that PyTorch can use. Pass --cpu."
        )
    if settings.num_processes == 1:
        return "gpu" if wants_gpus else "any"
    return "gpu" if machine.gpus else "cpu"


def _processes(settings: Settings, device: str, machine: Machine) -> int:
    if settings.num_processes is not None:
        return settings.num_processes
    if device == "cpu":
        return settings.num_machines
    chosen = None if settings.gpu_ids in (None, "all") else str(settings.gpu_ids).split(",")
    return (len(chosen) if chosen else machine.gpus) * settings.num_machines


def _check_gpus(here: int, settings: Settings, machine: Machine) -> None:
    there = machine.gpus
    if settings.gpu_ids not in (None, "all"):
        there = min(there, len(str(settings.gpu_ids).split(",")))
    if here > there:
        raise UsageError(
            f"{here} processes on this machine and {there} GPUs; each process needs one of its own. Pass "
            f"--num_processes {there * settings.num_machines}, or --cpu."
        )


def _rendezvous(settings: Settings, manner: Manner, machine: Machine) -> Rendezvous:
    """One machine needs no agreed port: any free one does, so that launches don't get in each other's way."""
    port = settings.main_process_port
    conf: dict[str, Any] = dict(manner.rdzv_conf)
    if settings.num_machines == 1 and not port:
        return Rendezvous(backend="c10d", endpoint=f"{_HERE}:0", conf=conf)
    if settings.machine_rank == 0 and port and not machine.is_free(port):
        raise UsageError(
            f"Port {port} (main_process_port) is in use on this machine. Choose another"
            + (
                ", or 0 for one that is free."
                if settings.num_machines == 1
                else ", the same on each machine."
            )
        )
    backend = settings.rdzv_backend or "static"
    if backend == "static":
        conf["rank"] = settings.machine_rank
    address = settings.main_process_ip or _HERE
    return Rendezvous(
        backend=backend, endpoint=f"{address}:{port or DEFAULT_PORT}", run_id="keepstep", conf=conf
    )


def _environment(
    settings: Settings, manner: Manner, machine: Machine, *, device: str, here: int
) -> dict[str, str]:
    """What ranks are told; the names are listed in docs/launching.md."""
    told: dict[str, str] = {}
    if settings.use_cpu or device == "cpu":
        told["KEEPSTEP_USE_CPU"] = "true"
    if settings.mixed_precision is not None:
        told["KEEPSTEP_MIXED_PRECISION"] = settings.mixed_precision
    if settings.gradient_accumulation_steps is not None:
        told["KEEPSTEP_GRADIENT_ACCUMULATION_STEPS"] = str(settings.gradient_accumulation_steps)
    if settings.debug:
        told["KEEPSTEP_DEBUG_MODE"] = "true"
    if settings.distributed_type == "FSDP":
        told["KEEPSTEP_USE_FSDP"] = "true"
        told |= {f"KEEPSTEP_{name.upper()}": value for name, value in settings.fsdp_config.items()}
    if settings.dynamo_config.get("dynamo_backend", "no").lower() != "no":
        told |= {f"KEEPSTEP_{name.upper()}": value for name, value in settings.dynamo_config.items()}
    if settings.gpu_ids not in (None, "all"):
        told["CUDA_VISIBLE_DEVICES"] = str(settings.gpu_ids)
    if manner.cpu_threads is not None:
        told["OMP_NUM_THREADS"] = str(manner.cpu_threads)
    elif here > 1 and "OMP_NUM_THREADS" not in machine.variables:
        told["OMP_NUM_THREADS"] = str(max(1, machine.cpus // here))
    if settings.num_machines == 1 and here > 1 and sys.platform == "linux":
        # gloo looks its own host name up otherwise, which not every machine can answer.
        if "GLOO_SOCKET_IFNAME" not in machine.variables:
            told["GLOO_SOCKET_IFNAME"] = "lo"
    return told
