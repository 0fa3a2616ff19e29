"""Processes that train together: which one this is, how they share a model, what they do together."""
