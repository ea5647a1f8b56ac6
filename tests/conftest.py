"""Time limits, skips with a reason, and the seconds of each lesson at the end."""

import pytest

TEST_LIMIT_S = 300
SECONDS = pytest.StashKey[dict]()
BUDGET_S = {"00": 60, "01": 60}  # the smoke profile on two cores; other lessons: 85


def pytest_configure(config):
    config.stash[SECONDS] = {}


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA card here"))
    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_LIMIT_S))


@pytest.fixture(scope="session")
def lesson_seconds(request):
    """Seconds of each lesson executed in this session, printed at its end."""
    return request.config.stash[SECONDS]


def pytest_terminal_summary(terminalreporter, config):
    seconds = config.stash[SECONDS]
    if not seconds:
        return
    terminalreporter.section("seconds of each lesson (with exercises and start-up)")
    for lesson, value in seconds.items():
        budget = BUDGET_S.get(lesson[:2], 85)
        note = f"  over its budget of {budget} s" if value > budget else ""
        terminalreporter.write_line(f"{lesson:<24} {value:6.1f} s{note}")
    terminalreporter.write_line(f"{'total':<24} {sum(seconds.values()):6.1f} s")
