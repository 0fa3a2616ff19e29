"""Do all ranks begin the same pass, in the same order? Asked once a pass.

Ranks that visit their data in different orders lose samples and train on others twice, and nothing else would
show it. A sampler with a state of each rank's own is the usual cause, or a data set that isn't the same
everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from keepstep.errors import RanksDifferError
from keepstep.world import World

__all__ = ["check_alike"]


def check_alike(world: World, loader: int, facts: Mapping[str, Any]) -> None:
    """Compare what the ranks know of a pass that begins.

    Args:
        world: the ranks; every one of them must call this.
        loader: its number, in the order of preparation.
        facts: plain values by name; they must be the same on every rank.

    Raises:
        RanksDifferError: naming the ranks and what differs.
        RankMissingError: a rank didn't begin a pass.
    """
    with world.meeting("beginning a pass over a loader", in_turn=True) as meeting:
        said = meeting.exchange(json.dumps({"loader": loader, **facts}).encode())
    everyone = [json.loads(words) for words in said]
    reference = everyone[0]
    differences = [
        f"{name} is {value!r} on rank {rank} and {reference.get(name)!r} on rank 0"
        for rank, facts_there in enumerate(everyone)
        for name, value in facts_there.items()
        if value != reference.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:8])
        raise RanksDifferError(
            f"The ranks don't begin the same pass over loader {loader}: {shown}. Every rank must prepare the "
            "same loaders and iterate over them alike. If the order of the samples differs, the data set or "
            "the sampler isn't the same on every rank: leave sharing out between ranks to prepare()."
        )
