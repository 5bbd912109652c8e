"""The only door to the outside world: network, processes, sandbox, hub names."""
