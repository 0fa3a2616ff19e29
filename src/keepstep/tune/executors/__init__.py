"""Runs trials: in processes, in this one, on a Ray cluster."""
