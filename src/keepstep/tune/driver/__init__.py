"""One process runs an experiment: it asks, launches, writes down, and answers."""
