"""Settings for every pytest run, `pytest --nbmake notebooks/` included."""

import os

import course_utils  # noqa: F401  sets the libraries' manners: no telemetry, no bars

# Programs that run alone: their tests are in tests/.
collect_ignore = ["maintenance/benchmarks", "maintenance/data_sets"]

# Kernels inherit these: the smoke profile, and the kernel of this environment.
os.environ.setdefault("COURSE_PROFILE", "smoke")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
