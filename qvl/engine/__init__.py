"""Answering: key/value cache, sampler, generation."""
