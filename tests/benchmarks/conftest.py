"""`make bench` runs these modules; `tests/test_benchmarks.py` tests the arithmetic."""

collect_ignore_glob = ["*.py"]
