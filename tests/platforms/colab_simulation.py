"""Run the first cells of lesson 00 on a pretended Colab: `simulate(python, folder)`.

Everything but Colab itself is real: an empty folder, `git clone` (github.com stands for
a copy of this checkout's last commit), pip in the Python given, an IPython kernel of
it. As a program: `python tests/platforms/colab_simulation.py PYTHON`, and packages of
that Python move as they would on Colab.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "platforms" / "fake_colab"
LAST_CELL = "questions"
LIST = """
import json
from importlib.metadata import distributions
print(json.dumps({d.name: d.version for d in distributions() if d.name}))
"""
WHERE = """
import course_utils, IPython, ipywidgets
from course_utils import runtime
print(IPython.__version__, ipywidgets.__version__)
print(course_utils.__file__)
print(runtime.build_folder())
"""


def packages(python: str) -> dict[str, str]:
    """Return name and version of what is installed for a Python."""
    done = subprocess.run([python, "-c", LIST], capture_output=True, check=True)
    return json.loads(done.stdout)


def simulate(python: str, folder: Path) -> dict:
    """Run lesson 00 as far as the first answers in `folder`, which must be empty.

    Returns:
        `outputs` by cell id (text), `moved` packages as {name: [before, after]}, the
        text of `where`, `seconds`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    name = project["tool"]["course"]["repository"]
    hub, content = folder / "github", folder / "content"
    content.mkdir(parents=True)
    clone = ["git", "clone", "-q", "--bare", str(ROOT), str(hub / name)]
    subprocess.run(clone, check=True)
    notebook = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    last = [cell.id for cell in notebook.cells].index(LAST_CELL)
    notebook.cells = notebook.cells[: last + 1]
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE, id="where"))
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    kernel.write_text(json.dumps(spec), encoding="utf-8")
    os.environ |= {
        "JUPYTER_PATH": str(folder / "jupyter"),
        "PYTHONPATH": str(FAKE),
        "COURSE_PROFILE": "smoke",
        # git reads github.com from the copy beside it
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{hub}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
    }
    before, start = packages(python), time.perf_counter()
    client = NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(content)}}
    )
    client.execute()
    seconds, after = time.perf_counter() - start, packages(python)
    outputs = {
        cell.id: "".join(
            output.get("text", "") or str(output.get("data", {}).get("text/plain", ""))
            for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    names = sorted(set(before) | set(after))
    moved = {n: [before.get(n), after.get(n)] for n in names}
    moved = {n: pair for n, pair in moved.items() if pair[0] != pair[1]}
    return {"outputs": outputs, "moved": moved, "seconds": seconds}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(simulate(sys.argv[1], Path(temporary)), indent=1))
