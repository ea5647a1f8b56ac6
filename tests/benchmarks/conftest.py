"""`make bench` runs these modules; `tests/test_benchmarks.py` tests their arithmetic."""

collect_ignore_glob = ["*.py"]
