"""Conformance: golden fixtures of the original reference code, replayed through the paged engine."""
