"""Settings for every pytest run, `pytest --nbmake notebooks/` included."""

import os

import course_utils  # noqa: F401  sets the libraries' manners: no telemetry, no bars

# No doctests there: builders are loaded by their paths, benchmarks by their own test.
collect_ignore = ["maintenance/benchmarks", "maintenance/data_sets"]

# Kernels inherit these: the smoke profile, and the kernel of this environment.
os.environ.setdefault("COURSE_PROFILE", "smoke")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
