"""How often to save: what a save costs, and when the next one is due."""
