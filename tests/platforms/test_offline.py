"""The guard that every test runs under: nothing here can connect outward.

192.0.2.1 and example.invalid are reserved for documentation. Attempts of these tests go
to a log of their own; any other fails the session (see conftest.py).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

OUTWARD = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "blocked"
    monkeypatch.setenv("COURSE_BLOCKED_LOG", str(path))
    return path


def test_this_process_cannot_connect_outward(log):
    with pytest.raises(PermissionError, match="outward connection blocked"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    with pytest.raises(PermissionError, match="example.invalid"):
        socket.getaddrinfo("example.invalid", 443)
    assert len(log.read_text().splitlines()) == 2


def test_a_process_that_a_test_starts_cannot_either(log):
    swallowed = f"try:\n    {OUTWARD}\nexcept OSError:\n    pass"
    done = subprocess.run([sys.executable, "-c", swallowed], capture_output=True)
    assert done.returncode == 0, "the process itself hides it"
    assert "192.0.2.1:80" in log.read_text(encoding="utf-8")


def test_the_hub_cannot_be_reached_even_where_it_is_asked(log, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it tries again, later
    with pytest.raises(Exception, match=r"(?i)blocked|offline|connect|cannot|locate"):
        huggingface_hub.hf_hub_download(
            "org/model", "config.json", cache_dir=log.parent
        )


def test_loopback_is_open():
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname(), timeout=5):
        pass


def test_nothing_reports_to_anyone():
    import course_utils  # noqa: F401

    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


PLANTED = f"""def test_swallowed(lesson_seconds):
    lesson_seconds("05_prompt", 99.0, 3.5)
    try:
        {OUTWARD}
    except OSError:
        pass
"""


@pytest.mark.parametrize("workers", [[], ["-p", "xdist", "-n", "1"]], ids=["", "xdist"])
def test_a_session_that_tries_in_secret_fails(tmp_path, workers):
    """A test that passes, in a session of its own with the same conftest.

    What it noted of a lesson is printed all the same.
    """
    (tmp_path / "test_planted.py").write_text(PLANTED, encoding="utf-8")
    here = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "conftest", "--rootdir", str(tmp_path), str(tmp_path), *workers]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": here, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "tried to connect outward: this session fails" in done.stdout
    assert done.returncode == 1
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "05_prompt 99.0 3.5 over its budget of 85 s" in printed
    assert "total 99.0 3.5" in printed
