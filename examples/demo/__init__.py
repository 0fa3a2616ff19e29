"""The demo: kills a training run three times and compares it with a twin that was never killed."""
