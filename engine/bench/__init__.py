"""Benchmarks of the engine: `linocut bench`."""
