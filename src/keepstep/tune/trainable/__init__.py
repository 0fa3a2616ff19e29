"""What a trial runs: a function or a class, and what it may ask for."""
