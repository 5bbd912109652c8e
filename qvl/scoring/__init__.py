"""Scorers: one set of pure functions for rewards and for benchmarks."""
