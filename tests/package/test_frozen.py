"""What may not move when the code does: recorded runs, data sets, orders, names.

`tests/data/frozen.json` was written before the package was folded. A recorded run is
found again by its label, seed and settings; a changed one would be trained anew. A
deliberate change: `PYTHONPATH=. .venv/bin/python tests/package/test_frozen.py`, and
read the difference before it is committed.
"""

import ast
import hashlib
import importlib
import json
from pathlib import Path

import pytest

from course_utils import records, runtime
from course_utils.data import _bundled_sets, _hash_split, data_hash
from course_utils.evaluation import stratified
from course_utils.training import SeededBatches
from maintenance.runs.lists import LESSON_RUNS

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "Makefile").exists())
FROZEN = ROOT / "tests" / "data" / "frozen.json"
LENGTHS = [(7 * n) % 23 + 3 for n in range(40)]


def digest(value) -> str:
    """Return twelve hexadecimal digits that change when the value does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identities() -> dict[str, list[str]]:
    """Return `label · seed · digest of the settings` of each run, by family."""
    families = {}
    for lesson in LESSON_RUNS.values():
        for name, family in lesson.items():
            runs = family() if callable(family) else family
            families[name] = [
                f"{run.label} · {run.seed} · {digest(run.settings())}" for run in runs
            ]
    return families


def seeded_orders() -> dict[str, list[int]]:
    orders = {}
    for seed in (0, 1):
        for together in (1, 4):
            batches = SeededBatches(LENGTHS, 4, seed, together=together)
            for epoch in (0, 2):
                batches.set_epoch(epoch)
                orders[f"seed {seed}, together {together}, epoch {epoch}"] = [*batches]
    return orders


def choices() -> dict[str, list]:
    rows = [{"n": n, "slice": "abc"[n * n % 3]} for n in range(50)]
    prompts = [{"prompt": f"Sentence {n} — “é”", "completion": ""} for n in range(30)]
    return {
        "stratified": [row["n"] for row in stratified(rows, 11)],
        "hashed": [_hash_split(fields) for fields in prompts],
    }


def used_names(paths) -> dict[str, list[str]]:
    """Return what notebooks take from each module of the package, by module."""
    names: dict[str, set] = {}
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        nodes = [n for t in texts if t[:1] not in "%!" for n in ast.walk(ast.parse(t))]
        modules = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "course_utils":
                modules |= {a.asname or a.name: a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                package, _, module = (node.module or "").partition(".")
                if package == "course_utils":
                    names.setdefault(module, set()).update(a.name for a in node.names)
        for node in nodes:
            of_module = isinstance(node, ast.Attribute) and ast.unparse(node.value)
            if of_module in modules:
                names.setdefault(modules[of_module], set()).add(node.attr)
    return {module: sorted(names[module]) for module in sorted(names)}


def now() -> dict:
    lessons = sorted((ROOT / "notebooks").glob("0[0-6]_*.ipynb"))
    return {
        "runs": identities(),
        "data": {name: data_hash(name) for name in _bundled_sets()},
        "orders": seeded_orders(),
        "choices": choices(),
        "names": used_names(lessons),
    }


@pytest.fixture(scope="module")
def frozen():
    return json.loads(FROZEN.read_text(encoding="utf-8"))


def test_recorded_runs_keep_their_identity(frozen):
    assert identities() == frozen["runs"]


def test_a_changed_setting_would_be_seen():
    settings = LESSON_RUNS["03"]["03_lora"][0].settings()
    assert digest(settings) != digest(settings | {"learning_rate": 0.00301})


def test_every_recorded_run_is_one_that_is_defined(frozen):
    for name, runs in frozen["runs"].items():
        if name in records.list_records():
            recorded = {
                f"{run['label']} · {run['seed']} · {digest(run['settings'])}"
                for run in records.load_record(name)["runs"]
            }
            assert recorded <= set(runs), name


def test_data_sets_keep_their_hash(frozen):
    assert {name: data_hash(name) for name in _bundled_sets()} == frozen["data"]


def test_batches_keep_their_order(frozen):
    assert seeded_orders() == frozen["orders"]


def test_choices_of_records_stay(frozen):
    assert choices() == frozen["choices"]


def test_names_that_lessons_0_to_6_import_are_where_they_were(frozen):
    for module, names in frozen["names"].items():
        loaded = importlib.import_module(f"course_utils.{module}")
        assert [n for n in names if not hasattr(loaded, n)] == [], module


if __name__ == "__main__":
    assert runtime.data_folder() == ROOT / "data"
    text = json.dumps(now(), indent=1, ensure_ascii=False)
    FROZEN.write_text(text + "\n", encoding="utf-8")
