"""What a run is told: by its script, by the environment, and for the libraries below."""
