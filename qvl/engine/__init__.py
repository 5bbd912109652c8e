"""Answering: scheduler, block manager, key/value and encoder caches, model runner, sampler, generation."""
