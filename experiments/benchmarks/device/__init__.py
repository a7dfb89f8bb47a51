"""What one accelerator does, in at most 12 minutes: `experiments.benchmarks.device.__main__`."""
