"""From files to live objects."""
