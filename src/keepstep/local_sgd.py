"""What scripts import from `accelerate.local_sgd`."""

from keepstep.train.local_sgd import LocalSGD

__all__ = ["LocalSGD"]
