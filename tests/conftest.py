"""What every test gets: the shape hook, one thread for torch (two test processes share the machine), no deadlines."""

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ("shape_hook", "pytester")

torch.set_num_threads(1)

# The same examples in every run, and no verdict by the clock: a busy machine is no bug.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
