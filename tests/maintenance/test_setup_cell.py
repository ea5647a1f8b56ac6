"""The set-up cell of every lesson, and `make links`, which names its repository."""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import notebook_rules as rules
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = rules.repository().split("/")[1]
LESSON = "notebooks/03_lora.ipynb"


@pytest.fixture
def make_links(tmp_path):
    """A function that runs `make links` in a small checkout; and the checkout."""
    if not (shutil.which("make") and shutil.which("perl")):
        pytest.skip("no make, or no perl")
    for name in ("pyproject.toml", "Makefile", "CITATION.cff", "README.md", LESSON):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)

    def run(*words):
        command = ["make", "links", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run, tmp_path


def test_make_links_names_the_repository_everywhere(make_links):
    run, checkout = make_links
    old = rules.repository()
    before = {p: p.read_text("utf-8") for p in checkout.rglob("*.*") if p.is_file()}
    before = {p: t for p, t in before.items() if ".git/" not in p.as_posix()}
    assert run("REPO=me/my-course").returncode == 0
    for path, text in before.items():
        assert path.read_text("utf-8") == text.replace(old, "me/my-course"), path
    assert old not in (checkout / LESSON).read_text("utf-8")
    assert 'repository = "me/my-course"' in (checkout / "pyproject.toml").read_text()
    assert run("REPO=other/name").returncode == 0, "and once more"
    assert "other/name/blob" in (checkout / LESSON).read_text("utf-8")


@pytest.mark.parametrize(
    "name",
    ["", "me", "me/a/b", 'me/"a', "me /a", 'a/b"; import os #', "a/$(id)", "a/$$(id)"]
    + ["a/b;id", "a/`id`", "a/b\nc/d"],
)
def test_what_is_no_repository_is_refused_and_nothing_changed(name, make_links):
    """The name is written into a cell that readers run."""
    run, checkout = make_links
    done = run(f"REPO={name}")
    assert done.returncode != 0 and "REPO=owner/name" in done.stdout + done.stderr
    assert (checkout / LESSON).read_text("utf-8") == (ROOT / LESSON).read_text("utf-8")


def run_setup(monkeypatch, tmp_path, packages):
    """Run the set-up cell on a pretended Colab; return the commands it would run."""
    import importlib.metadata

    commands = []
    found = [types.SimpleNamespace(name=n, version=v) for n, v in packages.items()]
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(importlib.metadata, "version", packages.get)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    exec(rules.setup_cell(), {})
    assert sys.path[0] == str(tmp_path / FOLDER)
    return [" ".join(words) for words in commands]


def test_on_colab_it_fetches_the_course_and_leaves_torch_alone(monkeypatch, tmp_path):
    packages = {"torch": "2.11.0", "torchao": "0.10.0", "pyarrow": "24.0.0"}
    monkeypatch.setitem(
        sys.modules, "pyarrow", types.SimpleNamespace(__version__="24.0.0")
    )
    clone, install, uninstall = run_setup(monkeypatch, tmp_path, packages)
    assert clone.startswith(f"git clone -q https://github.com/{rules.repository()} ")
    assert "uninstall -q -y torchao" in uninstall
    names = [word.split(">")[0].split("<")[0] for word in install.split()[5:]]
    assert {"transformers", "peft", "trl", "bitsandbytes", "gguf"} <= set(names)
    assert "huggingface_hub<2" in install
    assert not {"torch", "numpy", "torchao", "jupyterlab", "nbmake"} & set(names)


def test_on_colab_a_new_enough_torchao_stays(monkeypatch, tmp_path, capsys):
    packages = {"torchao": "0.16.0", "pyarrow": "24.0.0"}
    old = types.SimpleNamespace(__version__="18.1.0")
    monkeypatch.setitem(sys.modules, "pyarrow", old)
    (tmp_path / FOLDER).mkdir()
    (install,) = run_setup(monkeypatch, tmp_path, packages)
    assert "pip install -q transformers" in install
    assert "Restart session" in capsys.readouterr().out


def test_elsewhere_the_set_up_cell_does_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    names = {}
    exec(rules.setup_cell(), names)
    assert set(names) == {"sys", "__builtins__"} and sys.path == before
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_its_floors_are_those_of_pyproject():
    wanted = set(rules.pyproject()["project"]["dependencies"])
    cell = rules.setup_cell()
    lines = [line for line in cell.splitlines() if "floors =" in line or "+=" in line]
    floors = set(" ".join(line.split('"')[1] for line in lines).split())
    assert floors - wanted == {"huggingface_hub<2"}
    missing = {word.split(">")[0] for word in wanted - floors}
    assert missing == {"torch", "matplotlib"}, "Colab brings these"
