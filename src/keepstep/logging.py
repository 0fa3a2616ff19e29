"""What scripts import from `accelerate.logging`."""

from keepstep.track.console import RankLogger, get_logger

__all__ = ["MultiProcessAdapter", "get_logger"]

MultiProcessAdapter = RankLogger
