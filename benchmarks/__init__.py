"""Benchmarks of fastnn against stock PyTorch: `python -m benchmarks --help`."""
