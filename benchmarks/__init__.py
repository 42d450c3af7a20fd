"""Benchmarks of `dsbp_optax`: `python -m benchmarks --help`."""
