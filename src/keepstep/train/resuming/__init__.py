"""What of a run is saved, and how it goes on from there."""
