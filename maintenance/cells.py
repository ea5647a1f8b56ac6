"""What a lesson builds, taken from its cells: for tests, and for recorded runs."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from course_utils.data import data_hash

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DEFINITIONS = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef


def cells(stem: str, *names: str, definitions: bool = False) -> Any:
    """Execute code cells of a lesson, in this order; return their namespace.

    `cells("03_lora", "imports", "scratch").LoRALinear` is the lesson's class. With
    `definitions` only imports, functions, classes and literal constants are executed.

    Raises:
        KeyError: the lesson has no code cell of that id.
    """
    return more_cells(
        ModuleType(f"lesson_{stem}"), stem, *names, definitions=definitions
    )


def more_cells(
    lesson: ModuleType, stem: str, *names: str, definitions: bool = False
) -> ModuleType:
    """Execute further cells in a namespace that others have filled."""
    for name in names:
        tree = ast.parse(cell_source(stem, name))
        if definitions:
            tree.body = [node for node in tree.body if _defines(node)]
        exec(compile(tree, f"{stem}.ipynb, cell {name}", "exec"), vars(lesson))
    return lesson


def cell_source(stem: str, name: str) -> str:
    """The text of one code cell of a lesson."""
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    code = {c["id"]: c for c in notebook["cells"] if c["cell_type"] == "code"}
    if name not in code:
        raise KeyError(f"{stem}.ipynb has no code cell {name!r}: {', '.join(code)}")
    return "".join(code[name]["source"])


def source_hash(name: str) -> str:
    """SHA-256 of a data set, or of the cells that draw one: `"stem: cell cell"`."""
    stem, drawn, names = name.partition(": ")
    if not drawn:
        return data_hash(name)
    text = "\n".join(cell_source(stem, cell) for cell in names.split())
    return hashlib.sha256(text.encode()).hexdigest()


def _defines(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign):
        return isinstance(node, DEFINITIONS)
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True
