"""Putting a file into its place, where another process has it open for a while."""

import os

import pytest

from course_utils import runtime as files


@pytest.fixture
def pair(tmp_path):
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_text("new")
    target.write_text("old")
    return source, target


def refuse(monkeypatch, times, system):
    """`os.replace` is refused so many times, on such a system."""
    calls, real = [], os.replace

    def replace(source, target):
        calls.append(source)
        if len(calls) <= times:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.os, "name", system)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return calls


def test_a_file_takes_the_place_of_another(pair):
    source, target = pair
    files.replace_file(source, target)
    assert target.read_text() == "new" and not source.exists()


def test_windows_is_asked_again(pair, monkeypatch):
    source, target = pair
    calls = refuse(monkeypatch, 5, "nt")
    files.replace_file(str(source), str(target))
    monkeypatch.undo()
    assert len(calls) == 6 and target.read_text() == "new"


def test_other_systems_mean_it(pair, monkeypatch):
    calls = refuse(monkeypatch, 5, "posix")
    with pytest.raises(PermissionError):
        files.replace_file(*map(str, pair))
    assert len(calls) == 1


def test_patience_ends(pair, monkeypatch):
    refuse(monkeypatch, 10**9, "nt")
    monkeypatch.setattr(files, "PATIENCE_S", 0.0)
    with pytest.raises(PermissionError, match="denied"):
        files.replace_file(*map(str, pair))
