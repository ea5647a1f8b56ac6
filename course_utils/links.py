"""The repository's name in one place, and the cells of every lesson that carry it.

`pyproject.toml` says `[tool.course] repository = "owner/name"`. The Colab badge and
the set-up cell of each lesson repeat it, because a notebook opened on Colab stands
alone. `make links REPO=owner/name` writes a new name everywhere.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "CITATION.cff", "CONTRIBUTING.md")

SETUP_CELL = """\
# @title Set-up: on Colab, fetch and install the course; elsewhere, do nothing
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess
    from importlib.metadata import distributions, version

    repository = "{repository}"
    folder = os.path.abspath(repository.split("/")[-1])

    def run(*words):
        subprocess.run(words, check=True)

    if not os.path.isdir(folder):
        run("git", "clone", "-q", f"https://github.com/{{repository}}", folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder  # for the processes a lesson starts
    pip = (sys.executable, "-m", "pip")
    floors = "transformers>=5.15 peft>=0.20 trl>=1.10 datasets>=4.7 accelerate>=1.10"
    floors += " bitsandbytes>=0.49 gguf>=0.17 ipywidgets>=7.7 huggingface_hub<2"
    run(*pip, "install", "-q", *floors.split())
    found = {{d.name: d.version.split(".") for d in distributions()}}
    if "torchao" in found and tuple(map(int, found["torchao"][:2])) < (0, 16):
        run(*pip, "uninstall", "-q", "-y", "torchao")  # PEFT refuses such an old one
    old = getattr(sys.modules.get("pyarrow"), "__version__", None)
    if old not in (None, version("pyarrow")):
        print("Packages changed: Runtime > Restart session, then run this again")"""


def repository(root: Path = ROOT) -> str:
    """Return the `owner/name` that `pyproject.toml` gives.

    Args:
        root: the checkout's folder.
    """
    with open(root / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["course"]["repository"]


def setup_cell(name: str) -> str:
    """Return the source of the set-up cell, the same in every lesson.

    Args:
        name: the repository as `owner/name`.
    """
    return SETUP_CELL.format(repository=name)


def badge(name: str, notebook: str) -> str:
    """Return the Markdown of the *Open in Colab* badge.

    Args:
        name: the repository as `owner/name`.
        notebook: the notebook's file name.

    >>> badge("me/course", "03_lora.ipynb").endswith("notebooks/03_lora.ipynb)")
    True
    """
    colab = "https://colab.research.google.com"
    return (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
        f"({colab}/github/{name}/blob/main/notebooks/{notebook})"
    )


def rewrite(new: str, root: Path = ROOT) -> list[Path]:
    """Write a new repository name in every file that carries the old one.

    Args:
        new: the new name as `owner/name`.
        root: the checkout's folder.

    Returns:
        The files that changed.

    Raises:
        ValueError: `new` is not of the form `owner/name`.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise ValueError(f"expected owner/name, got {new!r}")
    old, changed = repository(root), []
    paths = [root / name for name in FILES] + sorted(root.glob("notebooks/*.ipynb"))
    for path in (path for path in paths if path.exists()):
        before = path.read_text(encoding="utf-8")
        after = before.replace(old, new)
        if after != before:
            if path.suffix == ".ipynb":
                json.loads(after)
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m course_utils.links owner/name`.

    Args:
        arguments: the words after the command; None reads the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: make links REPO=owner/name")
        return 2
    for path in rewrite(arguments[0]):
        print(f"changed {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
