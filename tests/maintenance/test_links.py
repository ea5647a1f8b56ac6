"""The repository's name: one place, and one command that changes it everywhere."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from course_utils import links

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    name = links.repository()
    cells = [links.badge(name, "03_lora.ipynb"), links.setup_cell(name)]
    text = json.dumps({"cells": [{"source": [c]} for c in cells]})
    (tmp_path / "notebooks" / "03_lora.ipynb").write_text(text, encoding="utf-8")
    return tmp_path


def test_rewriting_changes_every_place(checkout):
    changed = links.rewrite("me/my-course", checkout)
    assert [p.name for p in changed] == ["pyproject.toml", "03_lora.ipynb"]
    assert links.repository(checkout) == "me/my-course"
    notebook = json.loads((checkout / "notebooks" / "03_lora.ipynb").read_text())
    badge, setup = (cell["source"][0] for cell in notebook["cells"])
    assert badge == links.badge("me/my-course", "03_lora.ipynb")
    assert setup == links.setup_cell("me/my-course")
    assert links.rewrite("me/my-course", checkout) == []


@pytest.mark.parametrize("name", ["", "me", "me/a/b", 'me/"a', "me /a"])
def test_what_is_no_repository_is_refused(name, checkout):
    with pytest.raises(ValueError, match="owner/name"):
        links.rewrite(name, checkout)


def test_the_command_needs_one_name(capsys):
    assert links.main([]) == 2
    assert "REPO=owner/name" in capsys.readouterr().out


def run_setup(monkeypatch, tmp_path, packages):
    """Run the set-up cell on a pretended Colab; return the commands it would run."""
    import importlib.metadata
    import subprocess

    commands = []
    found = [types.SimpleNamespace(name=n, version=v) for n, v in packages.items()]
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(importlib.metadata, "version", packages.get)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    exec(links.setup_cell("me/my-course"), {})
    assert sys.path[0] == str(tmp_path / "my-course")
    return [" ".join(words) for words in commands]


def test_on_colab_it_fetches_the_course_and_leaves_torch_alone(monkeypatch, tmp_path):
    packages = {"torch": "2.11.0", "torchao": "0.10.0", "pyarrow": "24.0.0"}
    monkeypatch.setitem(
        sys.modules, "pyarrow", types.SimpleNamespace(__version__="24.0.0")
    )
    clone, install, uninstall = run_setup(monkeypatch, tmp_path, packages)
    assert clone.startswith("git clone -q https://github.com/me/my-course ")
    assert "uninstall -q -y torchao" in uninstall
    names = [word.split(">")[0].split("<")[0] for word in install.split()[5:]]
    assert {"transformers", "peft", "trl", "bitsandbytes", "gguf"} <= set(names)
    assert "huggingface_hub<2" in install
    assert not {"torch", "numpy", "torchao", "jupyterlab", "nbmake"} & set(names)


def test_on_colab_a_new_enough_torchao_stays(monkeypatch, tmp_path, capsys):
    packages = {"torchao": "0.16.0", "pyarrow": "24.0.0"}
    old = types.SimpleNamespace(__version__="18.1.0")
    monkeypatch.setitem(sys.modules, "pyarrow", old)
    (tmp_path / "my-course").mkdir()
    (install,) = run_setup(monkeypatch, tmp_path, packages)
    assert "pip install -q transformers" in install
    assert "Restart session" in capsys.readouterr().out


def test_elsewhere_the_set_up_cell_does_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    names = {}
    exec(links.setup_cell("me/my-course"), names)
    assert set(names) == {"sys", "__builtins__"} and sys.path == before
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_its_floors_are_those_of_pyproject():
    import tomllib

    with open(ROOT / "pyproject.toml", "rb") as file:
        wanted = set(tomllib.load(file)["project"]["dependencies"])
    cell = links.setup_cell("a/b")
    lines = [line for line in cell.splitlines() if "floors =" in line or "+=" in line]
    floors = set(" ".join(line.split('"')[1] for line in lines).split())
    assert floors - wanted == {"huggingface_hub<2"}
    missing = {word.split(">")[0] for word in wanted - floors}
    assert missing == {"torch", "matplotlib"}, "Colab brings these"
