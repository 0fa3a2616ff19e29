"""Readers of what other libraries wrote. Nothing here writes, and nothing that is read is executed."""
