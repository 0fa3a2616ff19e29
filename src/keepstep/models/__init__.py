"""Models out and in: weights as files that others load, empty models, and models larger than one device."""
