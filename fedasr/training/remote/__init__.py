"""Work directories and checkpoints in cloud storage: see `mirror`."""
