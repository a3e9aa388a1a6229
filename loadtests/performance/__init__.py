"""The numbers of docs/performance.md: `python -m loadtests.performance`."""
