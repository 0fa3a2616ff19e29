"""What a run logs: its own log, trackers, messages. Looking at a log never imports torch."""

from keepstep.track.reading import Log, Row, read_log

__all__ = ["Log", "Row", "read_log"]
