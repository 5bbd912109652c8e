"""Files on disk become packed batches here: shards, index, mixture, packing, and a loader that resumes exactly."""
