"""The package: two rooms with one door, small, light to import, all of it used."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import course_utils

PACKAGE = Path(course_utils.__file__).parent
ROOT = next(p for p in Path(__file__).resolve().parents if (p / "Makefile").exists())
MAX_MODULES = 26
MAX_LINES = 9_050
MAX_CODE_LINES = 6_000
MAX_MODULE_LINES = 600
MAX_LINES_BOTH_ROOMS = 11_900
IMPORT_LIMIT_S = 0.050
HEAVY = {
    *("torch", "transformers", "peft", "trl", "datasets", "accelerate", "gguf"),
    *("bitsandbytes", "numpy", "pandas", "matplotlib", "ipywidgets", "safetensors"),
}
# These subclass a heavy library's classes, so they import it at their top; the others
# import them inside functions only.
HEAVY_MODULES = {"course_utils.memory.dry_run", "course_utils.training_callbacks"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(p): p for p in sorted(PACKAGE.rglob("*.py"))}
TREES = {m: ast.parse(p.read_text(encoding="utf-8")) for m, p in FILES.items()}


def imports(tree: ast.Module, *, at_import_time: bool = False) -> set[str]:
    """Return the dotted modules, and names of modules, that a tree imports."""
    names, stack = set(), list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if at_import_time and inner:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        stack.extend(ast.iter_child_nodes(node))
    return names


def cycle(arrows: dict[str, set[str]]) -> set[str]:
    """Return the modules that are left when all that lead nowhere are taken away."""
    left = dict(arrows)
    while ready := [m for m, targets in left.items() if not targets & set(left)]:
        for module in ready:
            del left[module]
    return set(left)


def test_imports_are_read_from_the_tree():
    tree = ast.parse(
        "import re\nfrom course_utils import data\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import peft\n    from course_utils.models import load_model\n"
    )
    at_top = imports(tree, at_import_time=True)
    assert at_top == {"re", "course_utils", "course_utils.data"}
    assert {"peft", "course_utils.models"} <= imports(tree)


def test_the_package_never_imports_the_maintainers_room():
    for module, tree in TREES.items():
        tops = {name.split(".")[0] for name in imports(tree)}
        assert not tops & {"maintenance", "tests"}, module


def test_modules_import_each_other_one_way():
    ours = set(TREES) - {"course_utils"}
    arrows = {m: (imports(TREES[m]) & ours) - {m} for m in ours}
    # A sub-package's door passes on what its rooms hold.
    for module in ours:
        arrows[module] -= {d for d in arrows[module] if module.startswith(f"{d}.")}
    assert not cycle(arrows)
    assert cycle(arrows | {"course_utils.runtime": {"course_utils.training"}})


@pytest.mark.parametrize("module", sorted(set(TREES) - HEAVY_MODULES))
def test_nothing_heavy_is_imported_at_the_top(module):
    at_top = imports(TREES[module], at_import_time=True)
    packages = {name.split(".")[0] for name in at_top}
    assert packages <= set(sys.stdlib_module_names) | {"course_utils"}
    assert not at_top & HEAVY_MODULES, "import it inside a function"


def test_importing_every_module_loads_nothing_heavy():
    names = ", ".join(sorted(set(TREES) - HEAVY_MODULES))
    code = f"import sys\nimport {names}\nprint(*{HEAVY!r}.intersection(sys.modules))"
    assert run_python(code).split() == []


def test_importing_the_package_takes_no_time():
    code = "import time; t = time.process_time(); import course_utils\n"
    code += "print(time.process_time() - t)"
    times = [float(run_python(code)) for _ in range(5)]
    assert min(times) <= IMPORT_LIMIT_S, times


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def lines_of(paths) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def code_lines(text: str) -> int:
    """Count lines of code: no blank, comment, docstring, import or list of names.

    >>> code_lines('import re\\ndef f():\\n    "Say."\\n\\n    # why\\n    return 1\\n')
    2
    """
    prose = set()
    for node in ast.walk(ast.parse(text)):
        text_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_text = text_alone and isinstance(node.value.value, str)
        is_names = isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)
        if is_text or is_names or isinstance(node, ast.Import | ast.ImportFrom):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.split("\n"), start=1)
    return sum(
        1 for n, ln in lines if n not in prose and ln.strip() and ln.strip()[0] != "#"
    )


def test_the_package_is_small():
    modules = [p for p in FILES.values() if p.name != "__init__.py"]
    code = sum(code_lines(p.read_text(encoding="utf-8")) for p in FILES.values())
    assert len(modules) <= MAX_MODULES
    assert lines_of(FILES.values()) <= MAX_LINES
    assert code <= MAX_CODE_LINES
    assert max(lines_of([p]) for p in FILES.values()) <= MAX_MODULE_LINES


def test_both_rooms_together_are_small():
    room = [
        path
        for path in (ROOT / "maintenance").rglob("*.py")
        if not {"benchmarks", "data_sets"} & set(path.parts)
    ]
    assert len(room) > 5
    assert lines_of([*FILES.values(), *room]) <= MAX_LINES_BOTH_ROOMS


def test_no_drawer_for_odds_and_ends():
    stems = {module.split(".")[-1] for module in FILES}
    assert not {"utils", "helpers", "common", "misc", "base"} & stems


def test_what_is_public_is_described_and_typed():
    bad = []
    for module, tree in TREES.items():
        if not ast.get_docstring(tree):
            bad.append(f"{module} has no docstring")
        for node in tree.body:
            public = getattr(node, "name", "_")[0] != "_"
            if public and not ast.get_docstring(node):
                bad.append(f"{module}.{node.name}: no docstring")
            if public and isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args]
                arguments += node.args.kwonlyargs
                untyped = [a.arg for a in arguments if a.annotation is None]
                untyped += [] if node.returns else ["return"]
                bad += [f"{module}.{node.name}({a}): no type" for a in untyped]
    assert not bad, "\n".join(bad)


# --- a public name has a caller --------------------------------------------------


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """Return the public functions and classes of a module, by name."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {n.name: n for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"}


def handed_on(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Return what each dotted name that a module imports stands for, one step on."""
    return {
        f"{module}.{alias.asname or alias.name}": f"{node.module}.{alias.name}"
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def called(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return the dotted names that a tree takes from modules: imported, or by a dot.

    A name alone says nothing: `x.size` is a tensor's, `plotting.size` would be ours.
    """
    aliases, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                if dotted in modules:
                    aliases[alias.asname or alias.name] = dotted
                names.add(dotted)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            names.add(f"{aliases[ast.unparse(node.value)]}.{node.attr}")
    return names


def without_caller(trees: dict[str, ast.Module], outside: list[ast.Module]) -> set[str]:
    """Return the public functions and classes that only their own module uses.

    A class is used, too, where callers get it: returned, raised, a public function's
    or field's type, or the maker of a public constant.
    """
    doors = {m for m in trees if any(other.startswith(f"{m}.") for other in trees)}
    steps, used = handed_on(trees), set()
    callers = [(m, tree) for m, tree in trees.items() if m not in doors]
    for module, tree in callers + [("", tree) for tree in outside]:
        for name in called(tree, set(trees)):
            while name in steps and name.rpartition(".")[2]:
                name = steps[name]
            if name.rpartition(".")[0] != module:
                used.add(name)
    lonely = set()
    for module, tree in trees.items():
        for name, node in definitions(tree).items():
            others = ast.Module([n for n in tree.body if n is not node], [])
            is_got = isinstance(node, ast.ClassDef) and re.search(
                rf"(-> .*|raise |return |^ *\w+: .*|^[A-Z]\w* = )\b{name}\b",
                ast.unparse(others),
                re.MULTILINE,
            )
            if f"{module}.{name}" not in used and not is_got:
                lonely.add(f"{module}.{name}")
    return lonely


def lesson_trees() -> list[ast.Module]:
    """Return the code of all lessons, the solutions of their exercises included."""
    trees = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = []
        for cell in cells:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                text = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
            texts.append(text)
        trees.append(ast.parse("\n".join(texts)))
    return trees


def test_every_public_name_has_a_caller():
    room = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / "maintenance").rglob("*.py")
    ]
    assert not without_caller(TREES, [*lesson_trees(), *room])


def test_a_public_name_without_a_caller_is_seen():
    trees = {
        "course_utils.a": ast.parse("def used(): ...\ndef size(): ...\nx.size()\n"),
        "course_utils.b": ast.parse("from course_utils.a import used\ny.size\n"),
    }
    assert without_caller(trees, []) == {"course_utils.a.size"}
    lesson = ast.parse("from course_utils import a\na.size()")
    assert without_caller(trees, [lesson]) == set()
    lesson = ast.parse("from course_utils.b import used\nz.size()")
    assert without_caller(trees, [lesson]) == {"course_utils.a.size"}
