"""Data builders, and test files whose checks serve elsewhere, loaded by their path."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


def load_file(path: Path, name: str) -> ModuleType:
    """A module of its own from that file, without a `__pycache__` beside it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
