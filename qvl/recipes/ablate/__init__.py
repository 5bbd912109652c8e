"""Ablations: the same run twice or thrice with one switch between, several seeds, and what these seeds could have seen."""
