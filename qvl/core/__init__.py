"""What every room shares: the shape legend, Batch, config, logging, device facts."""
