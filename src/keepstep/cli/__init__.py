"""The command line: looks at checkpoints, never imports torch."""
