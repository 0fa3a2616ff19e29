"""keepstep checkpoints through torch.distributed.checkpoint: `dcp.save`, `dcp.async_save`, `dcp.load`.

    dcp.save(state_dict, storage_writer=keepstep.dcp.StorageWriter("checkpoints/step_100"))
    dcp.load(state_dict, storage_reader=keepstep.dcp.StorageReader("checkpoints/step_100"))

What is written is a keepstep checkpoint: safetensors, state.json and a manifest with digests, published by
one rename. DCP's planners do the arithmetic of shards. Values that are no tensors are written as typed JSON:
DCP's planners would pickle them, so they are fetched and set past the planner, which its default ones allow.
"""

from __future__ import annotations

from keepstep.checkpoint.dcp.reading import StorageReader
from keepstep.checkpoint.dcp.writing import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
