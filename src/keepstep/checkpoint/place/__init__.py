"""Where checkpoints live, and the one commit point of each such place. No torch."""
