"""What a configuration of Accelerate's may ask for and keepstep has not: named, with what does the same.

Nothing is passed over: a run that silently left out what its file asks for would be another run.
"""

from __future__ import annotations

from typing import Final

from keepstep.errors import UsageError
from keepstep.launch.settings import Settings

__all__ = ["refuse_what_is_missing"]

_KINDS: Final = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
_INSTEAD: Final = {
    "DEEPSPEED": "DeepSpeed. keepstep shards parameters, gradients and optimizers with PyTorch's own FSDP2: "
    "distributed_type FSDP, or --use_fsdp",
    "MEGATRON_LM": "Megatron-LM. For models that fit the GPUs when sharded, use distributed_type FSDP",
    "XLA": "TPUs (torch_xla). Train on CPUs or CUDA GPUs",
    "TPU": "TPUs (torch_xla). Train on CPUs or CUDA GPUs",
}
_SECTIONS: Final = {
    "deepspeed_config": _INSTEAD["DEEPSPEED"],
    "megatron_lm_config": _INSTEAD["MEGATRON_LM"],
    "fp8_config": "8-bit layers (torchao, TransformerEngine). Use mixed_precision bf16",
    "parallelism_config": "tensor, context and pipeline parallelism. Use data parallelism, or FSDP",
    "mpirun_config": "starting by mpirun. keepstep starts the processes itself: remove mpirun_config",
    "downcast_bf16": "downcast_bf16, which is for TPUs",
    "enable_cpu_affinity": "binding ranks to processors. Start `keepstep launch` under numactl or taskset",
}


def refuse_what_is_missing(settings: Settings) -> None:
    """Refuse what keepstep cannot do, before anything is started.

    Raises:
        UsageError: naming what was asked for and what does the same.
    """
    if settings.compute_environment != "LOCAL_MACHINE":
        raise UsageError(
            f"compute_environment is {settings.compute_environment!r}; keepstep starts processes on the "
            "machine that it runs on, LOCAL_MACHINE. For a job elsewhere, run `keepstep launch` in that job."
        )
    kind = settings.distributed_type
    if kind is not None and kind not in _KINDS:
        raise UsageError(
            f"distributed_type is {kind!r}, and keepstep has no support for "
            f"{_INSTEAD.get(kind, 'it. Train on CPUs or CUDA GPUs')} (allowed: {', '.join(_KINDS)})."
        )
    for name in settings.unsupported:
        what = _SECTIONS.get(
            name, _INSTEAD["XLA"] if name.startswith("tpu_") else "jobs in a cloud's own service"
        )
        raise UsageError(f"{name} is set, and keepstep has no support for {what}. Remove it to launch.")
    if settings.mixed_precision == "fp8":
        raise UsageError(
            f"mixed_precision is 'fp8', and keepstep has no support for {_SECTIONS['fp8_config']}."
        )
    _refuse_old_sharding(settings)


def _refuse_old_sharding(settings: Settings) -> None:
    version = settings.fsdp_config.get("fsdp_version", "2")
    if settings.distributed_type == "FSDP" and version not in ("1", "2"):
        raise UsageError(f"fsdp_version is {version!r}; expected 2 (or 1, which is run as 2).")
