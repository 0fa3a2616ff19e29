"""From a live state to committed files."""
