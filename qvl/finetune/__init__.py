"""Training of a checkpoint on one's own data: the run, what it reads and replays, and what watches that nothing is forgotten."""
