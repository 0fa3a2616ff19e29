from __future__ import annotations

import torch

from keepstep.world import OneRank, World


def test_one_rank_answers_for_itself() -> None:
    world: World = OneRank()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.kind) == (0, 1, 0, 1, "NO")
    tree = {"a": torch.ones(2)}
    world.barrier()
    assert world.gather(tree) is tree
    assert torch.equal(world.reduce(tree, "sum")["a"], torch.ones(2))
    assert world.reduce(tree, "mean") is tree
    assert world.broadcast("x") == "x"
    assert world.agree(True)
    assert not world.agree(False)
    assert repr(world) == "OneRank()"
