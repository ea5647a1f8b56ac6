"""Recorded runs recompute to themselves; an edited figure is found."""

import copy
import json
import multiprocessing
import re
import subprocess
import sys

import pytest
from recomputing import differences

from course_utils import records
from course_utils.data import data_hash
from course_utils.records import RecordError, list_records, load_record
from course_utils.runtime import data_folder
from maintenance import store
from maintenance.cells import source_hash
from maintenance.readme import recorded
from maintenance.store import (
    hardware,
    recompute,
    save_record,
    validate_record,
)


def run(label="lora", seed=0, right=3, **more):
    truth = [f'{{"action": "a{i}", "level": {i}}}' for i in range(4)]
    guess = [*truth[:right], *['{"action": "none"}'] * (4 - right)]
    return {
        "label": label,
        "settings": {"r": 8},
        "seed": seed,
        "loss": [2.0, 1.0 + seed],
        "eval_loss": [[2, 1.5]],
        "predictions": guess,
        "references": truth,
        "slices": ["seen", "seen", "typos", "typos"],
        "metrics": ["exact_match", "field_f1", "by_slice", "final_loss"],
        "seconds": 3.5,
        "trainable_parameters": 134_515_008,
    } | more


def draft(**more):
    return {
        "command": "make runs LESSON=03",
        "hardware": {"cpu": "two cores"},
        "versions": {"torch": "2.13.0"},
        "data": {"name": "home_commands", "sha256": "0" * 64},
        "seconds": 9.0,
        "runs": [run(), run(seed=1, right=2), run("lr 0.001", right=1)],
    } | more


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "03_x"}', "{"])
def test_a_malformed_record_is_named(folder, text):
    folder.mkdir()
    (folder / "03_x.json").write_text(text)
    for read in (load_record, lambda name: recorded(f"{name}:loss")):
        with pytest.raises(RecordError, match="03_x.json"):
            read("03_x")


def test_a_saved_record_is_computed_valid_and_found(folder):
    assert list_records() == []
    path = save_record("03_lora", draft())
    assert path == folder / "03_lora.json" and list_records() == ["03_lora"]
    record = load_record("03_lora")
    assert differences(record) == []
    assert record["runs"][0]["metrics"] == {
        "exact_match": 0.75,
        "field_f1": pytest.approx(12 / 15),
        "by_slice": {"seen": 1.0, "typos": 0.5},
        "final_loss": 1.0,
    }
    assert recorded("03_lora:exact_match.lora") == 0.625
    assert recorded("03_lora:exact_match_min.lora") == 0.5
    assert recorded("03_lora:exact_match.lr 0.001") == 0.25  # a key with a dot
    assert recorded("03_lora:by_slice.lora.typos") == 0.25
    assert recorded("03_lora:seeds.lora") == 2
    assert recorded("03_lora:runs.1.metrics.final_loss") == 2.0
    assert recorded("03_lora:hardware.cpu") == "two cores"
    assert len(path.read_text().splitlines()) < 20  # one line a run, not one a number


@pytest.mark.parametrize(
    "path",
    [
        ("summary", "exact_match", "lora"),
        ("summary", "exact_match_max", "lr 0.001"),
        ("runs", 1, "metrics", "exact_match"),
        ("runs", 1, "metrics", "by_slice", "seen"),
        ("runs", 0, "metrics", "final_loss"),
        ("runs", 0, "seconds"),
        ("runs", 0, "predictions", 3),
    ],
)
def test_an_edited_figure_is_found(folder, path):
    save_record("03_lora", draft())
    record = load_record("03_lora")
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    holder[path[-1]] = (
        record["runs"][0]["references"][3] if path[-1] == 3 else old * 1.01
    )
    assert differences(record)


def test_a_figure_that_is_dropped_or_added_is_found(folder):
    save_record("03_lora", draft())
    record = load_record("03_lora")
    del record["summary"]["exact_match"]["lora"]
    record["summary"]["speed"] = {"lora": 2}
    assert sorted(differences(record)) == [
        "summary.exact_match.lora: not stored",
        "summary.speed.lora: not computed",
    ]


def test_a_record_may_have_a_summary_and_metrics_of_its_own(folder, monkeypatch):
    steps = {"steps": lambda run: len(run["loss"])}
    monkeypatch.setattr(store, "METRICS", store.METRICS | steps)

    def summary(runs):
        return {"best": max(runs, key=lambda r: r["metrics"]["steps"])["label"], 1: 2}

    monkeypatch.setattr(store, "SUMMARIES", {"02_rates": summary})
    runs = [
        run("short", metrics=["steps"]),
        run("long", loss=[3, 2, 1], metrics=["steps"]),
    ]
    save_record("02_rates", draft(runs=runs))
    record = load_record("02_rates")
    assert record["summary"] == {"best": "long", "1": 2}
    assert differences(record) == []
    record["summary"]["best"] = "short"
    assert differences(record) == ["summary.best: 'short' stored, 'long' computed"]


def test_losses_that_are_not_finite_become_null(folder):
    runs = [run(loss=[3.0, float("inf"), float("nan")], eval_loss=[[1, float("nan")]])]
    runs[0]["measured"] = {"general_questions": {"after": {"loss": float("nan")}}}
    save_record("02_curves", draft(runs=runs))
    [saved] = load_record("02_curves")["runs"]
    assert saved["loss"] == [3.0, None, None] and saved["eval_loss"] == [[1, None]]
    assert saved["metrics"]["final_loss"] == 3.0
    assert saved["measured"]["general_questions"]["after"]["loss"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("command"), "'command' is a required property"),
        (lambda r: r.update(seconds="9"), r"\$.seconds: '9' is not of type 'number'"),
        (lambda r: r.update(seconds=True), r"\$.seconds: True is not of type"),
        (lambda r: r.update(schema=2), r"\$.schema: 1 was expected"),
        (lambda r: r.update(created="today"), r"\$.created: 'today' is not a 'date'"),
        (lambda r: r.update(created="2026-13-01"), "'2026-13-01' is not a 'date'"),
        (lambda r: r.update(note="x"), "'note' was unexpected"),
        (lambda r: r.update(runs=[]), r"\$.runs: .* non-empty"),
        (lambda r: r["data"].pop("sha256"), r"\$.data: 'sha256' is a required"),
        (lambda r: r["runs"][0].pop("seed"), r"runs\[0\]: 'seed' is a required"),
        (
            lambda r: r["runs"][0].update(machine={}),
            "machine: 'hardware' is a required",
        ),
        (lambda r: r["runs"][1]["slices"].pop(), r"runs\[1\]: lengths differ"),
        (lambda r: r["runs"][0].update(loss=["2"]), r"loss\[0\]: '2' is not of type"),
        (lambda r: r["runs"][0].update(eval_loss=[3]), r"eval_loss\[0\]: 3 is not of"),
        (lambda r: r["runs"][0].update(eval_loss=[[3]]), r"eval_loss\[0\]: .*short"),
        (lambda r: r["runs"][0]["predictions"].__setitem__(0, None), "None is not of"),
        (lambda r: r["runs"][0]["metrics"].update(a=float("nan")), "not JSON"),
    ],
)
def test_a_malformed_record_says_what_is_wrong(folder, change, words):
    save_record("03_lora", draft())
    record = load_record("03_lora")
    validate_record(record)
    change(record)
    with pytest.raises(RecordError, match=words):
        validate_record(record)


def test_a_metric_that_nothing_computes_is_refused(folder):
    with pytest.raises(RecordError, match="nothing computes the metric 'speed'"):
        save_record("03_lora", draft(runs=[run(metrics={"speed": 3})]))
    bare = {k: v for k, v in run().items() if k != "predictions"}
    with pytest.raises(RecordError, match="needs 'predictions'"):
        save_record("03_lora", draft(runs=[bare]))
    assert list_records() == [] and not list(folder.glob("*"))


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    path = save_record("03_lora", draft())
    before = path.read_text()
    monkeypatch.setattr(store, "_as_text", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_record("03_lora", draft(seconds=1.0))
    assert path.read_text() == before
    assert [file.name for file in folder.iterdir()] == ["03_lora.json"]


def _save_often(folder, seconds, together):
    records.data_folder = lambda: folder
    together.wait(600)
    for _ in range(20):
        save_record("03_lora", draft(seconds=seconds))


def test_two_writers_never_leave_a_broken_file(folder):
    save_record("03_lora", draft())
    context = multiprocessing.get_context("spawn")  # a fork copies locks that are held
    together = context.Barrier(3)
    writers = [
        context.Process(target=_save_often, args=(folder.parent, seconds, together))
        for seconds in (1.0, 2.0)
    ]
    for writer in writers:
        writer.start()
    together.wait(600)
    while any(writer.is_alive() for writer in writers):
        try:
            found = load_record("03_lora")["seconds"]
        except PermissionError:  # on Windows, while it is replaced
            continue
        assert found in (1.0, 2.0, 9.0)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0


def test_unknown_names_and_paths_say_what_there_is(folder):
    save_record("03_lora", draft())
    for path, words in [
        ("04_pissa:x", "no record '04_pissa'; recorded: 03_lora.*runs LESSON=04`"),
        ("03_lora", "nothing at 'a key'; there is"),
        ("03_lora:score", "nothing at 'score'; there is .*exact_match"),
        ("03_lora:exact_match.full", "nothing at 'full'; there is lora, lr 0.001"),
        ("03_lora:seconds.lora.x", "nothing at 'x'; there is float"),
        ("03_lora:runs.7", "nothing at '7'; there is 0, 1"),
    ]:
        with pytest.raises(RecordError, match=words):
            recorded(path)
    (folder / "03_lora.json").rename(folder / "05_other.json")
    with pytest.raises(RecordError, match="holds the record '03_lora'"):
        load_record("05_other")
    (folder / "05_other.json").write_text("{")
    with pytest.raises(RecordError, match="05_other.json is not JSON"):
        load_record("05_other")


def test_recompute_leaves_its_argument_alone(folder):
    save_record("03_lora", draft())
    record = load_record("03_lora")
    record["summary"] = {}
    before = copy.deepcopy(record)
    assert recompute(record)["summary"] and record == before


def committed():
    import maintenance.benchmarks.summary  # noqa: F401, the summary of `bench`

    return list_records()


@pytest.mark.parametrize("name", committed())
def test_every_committed_record_recomputes_to_itself(name):
    record = load_record(name)
    validate_record(record)
    assert differences(record) == []
    # and the check can fail: one wrong answer more must show
    for run in record["runs"]:
        if "exact_match" in run["metrics"]:
            run["predictions"][0] = "edited"
            run["predictions"][-1] = "edited"
            spoilt = run["metrics"]["exact_match"] > 0
            assert differences(record) or not spoilt
            break


def test_committed_records_were_made_with_the_data_that_lies_here():
    sources = {name: load_record(name)["data"] for name in committed()}
    assert sources.pop("course_cpu")["name"] == "all lessons"
    for name, source in sources.items():
        for one in (source, source.get("also", source)):
            assert one["sha256"] == source_hash(one["name"]), name
        for run in load_record(name)["runs"]:
            if second := run["settings"].get("also_test"):
                assert run["measured"]["also_test"]["sha256"] == data_hash(second)


def test_the_data_card_names_each_adapter_with_its_run_and_bytes():
    """The last table of `data/README.md`, against the files and the records."""
    folder = data_folder() / "adapters"
    card = (data_folder() / "README.md").read_text(encoding="utf-8")
    row = (
        r"^\| `(\w+)` \| run `(\w+)`: (\d+) virtual tokens, "
        r"(\d+) steps of (\d+) examples \| ([\d,]+) \|$"
    )
    rows = re.findall(row, card.partition("## Adapters")[2], re.MULTILINE)
    assert [name for name, *_ in rows] == sorted(p.name for p in folder.iterdir())
    for name, record, *numbers in rows:
        (kept,) = (
            run
            for run in load_record(record)["runs"]
            if run["settings"].get("keep_adapter") == name
        )
        settings, size = kept["settings"], kept["measured"]["adapter_bytes"]
        tokens = settings["method"]["num_virtual_tokens"]
        assert [int(number.replace(",", "")) for number in numbers] == [
            tokens,
            settings["steps"],
            settings["batch_size"],
            size,
        ]
        assert (folder / name / "adapter_model.safetensors").stat().st_size == size


def test_records_import_nothing_heavy():
    code = (
        "import sys, course_utils.records, maintenance.readme\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_file_is_plain_json(folder):
    path = save_record("03_lora", draft())
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["schema"] == 1 and text.endswith("}\n")
    assert path.stat().st_mode & 0o044 == 0o044  # others may read it


def test_the_machine_is_described_in_plain_data():
    assert json.loads(json.dumps(hardware()))["cores"] >= 1
