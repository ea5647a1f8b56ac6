"""Settings for every pytest run, `pytest --nbmake notebooks/` included."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the processors
    share = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import course_utils  # noqa: F401  sets the libraries' manners: no telemetry, no bars

# No doctests there: builders are loaded by their paths, benchmarks by their own test.
collect_ignore = ["maintenance/benchmarks", "maintenance/data_sets"]

# Kernels inherit these: the smoke profile, and the kernel of this environment.
os.environ.setdefault("COURSE_PROFILE", "smoke")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
