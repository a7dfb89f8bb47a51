"""Compiles a run's programs for accelerators that are not there, by their own compilers."""
