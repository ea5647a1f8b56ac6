"""What a lesson builds, taken from its cells: tests run on what a reader sees."""

import ast
import json
from pathlib import Path
from types import ModuleType

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DEFINITIONS = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef


def cells(stem, *names, definitions=False):
    """Execute code cells of a lesson, in this order; return their namespace.

    `cells("03_lora", "imports", "scratch").LoRALinear` is the lesson's class. With
    `definitions` only imports, functions, classes and literal constants are executed.

    Raises:
        KeyError: the lesson has no code cell of that id.
    """
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    code = {c["id"]: c for c in notebook["cells"] if c["cell_type"] == "code"}
    lesson = ModuleType(f"lesson_{stem}")
    for name in names:
        if name not in code:
            raise KeyError(f"{stem}.ipynb has no code cell {name!r}: {', '.join(code)}")
        tree = ast.parse("".join(code[name]["source"]))
        if definitions:
            tree.body = [node for node in tree.body if _defines(node)]
        exec(compile(tree, f"{stem}.ipynb, cell {name}", "exec"), vars(lesson))
    return lesson


def _defines(node):
    if not isinstance(node, ast.Assign):
        return isinstance(node, DEFINITIONS)
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True
