from __future__ import annotations

import pytest
import torch

from keepstep.errors import UsageError
from keepstep.world import OneRank, World


def test_one_rank_answers_for_itself() -> None:
    world: World = OneRank()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.kind) == (0, 1, 0, 1, "NO")
    tree = {"a": torch.ones(2)}
    world.barrier()
    assert world.gather(tree) is tree
    assert torch.equal(world.reduce(tree, "sum")["a"], torch.ones(2))
    reduced = world.reduce(tree, "mean")["a"]
    assert torch.equal(reduced, tree["a"])
    assert reduced is not tree["a"]  # or `total += ...` would change what was given
    with pytest.raises(UsageError, match="reduction is 'median'; allowed: 'sum', 'mean', 'max', 'none'"):
        world.reduce(tree, "median")  # type: ignore[arg-type]
    assert world.broadcast_tensors(tree) is tree
    assert world.exchange_bytes(lambda: b"x", "exchange") == [b"x"]
    assert world.broadcast("x") == "x"
    assert world.agree(True)
    assert not world.agree(False)
    assert repr(world) == "OneRank()"
