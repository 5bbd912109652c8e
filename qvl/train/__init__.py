"""One loop for every stage: objective, parameter groups, optimizer, schedule, step, checkpoints, metrics."""
