"""Many devices: meshes, sharding, collectives."""
