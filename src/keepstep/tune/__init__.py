"""keepstep.tune: many trials, none of which loses progress. The names are those of `ray.tune`."""

from __future__ import annotations
