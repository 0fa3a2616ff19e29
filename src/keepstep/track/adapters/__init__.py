"""One module a tracker; a package that it needs is imported there and nowhere else."""
