"""Loaders: which batch comes when, on which rank, and where it comes from."""
