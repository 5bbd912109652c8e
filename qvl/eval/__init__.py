"""Measuring: the network against its reference, later benchmarks as small task files."""
