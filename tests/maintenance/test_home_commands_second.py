"""The second test set of the home commands: schema, slices, leakage, rebuild.

Each check of the first test split that says what a split promises runs on this one.
What must not leak here is what any training set says, and the first test itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import pytest
from builders import load_file, read_lines

ROOT = Path(__file__).resolve().parents[2]
DATA, SOURCES = ROOT / "data", ROOT / "maintenance" / "data_sets"
FOLDER = DATA / "home_commands_second_test"


# The checks of the first test split, applied to this one.
checks = load_file(
    Path(__file__).with_name("test_home_commands.py"), "first_test_checks"
)
RECORDS = read_lines(FOLDER / "test.jsonl")
TRAINING = {
    f"home_commands{ending}": read_lines(
        DATA / f"home_commands{ending}" / "train.jsonl"
    )
    for ending in ("", "_large", "_wide")
}
EARLIER = {
    **TRAINING,
    **{
        split: read_lines(DATA / "home_commands" / f"{split}.jsonl")
        for split in ("validation", "test")
    },
}


@pytest.fixture(scope="module")
def rebuilt():
    return load_file(SOURCES / FOLDER.name / "build.py", "second_test_build").build()


# --- shape ----------------------------------------------------------------------------


def test_as_many_records_a_slice_as_in_the_first_test():
    first = Counter(r["slice"] for r in EARLIER["test"])
    assert Counter(r["slice"] for r in RECORDS) == first
    assert set(first) == checks.SLICES


def test_every_record_is_canonical_and_valid():
    for record in RECORDS:
        assert list(record) == ["prompt", "completion", "slice"]
        answer = json.loads(record["completion"])
        assert record["completion"] == json.dumps(answer, ensure_ascii=False)
        assert checks.problems(answer) == [], record
        assert len(record["completion"]) <= 260
        prompt = record["prompt"]
        assert prompt == prompt.strip() and 1 <= len(prompt.split()) <= 25
        assert not re.search(r"[{}\[\]|\x00-\x1f]|  |\(n\)| ,|,,", prompt), prompt


def test_slices_are_what_they_say():
    for record in RECORDS:
        n, name = len(checks.actions_of(record)), record["slice"]
        if name == "multi_action":
            assert n >= 2
        elif name == "out_of_scope":
            assert record["completion"] == '{"action": "none"}'
        elif name != "negation":
            assert n == 1
            assert checks.actions_of(record)[0]["action"] != "none"
    multi = [r for r in RECORDS if r["slice"] == "multi_action"]
    assert Counter(len(checks.actions_of(r)) for r in multi)[3] >= 8


def test_class_balance():
    counts = Counter(a["action"] for r in RECORDS for a in checks.actions_of(r))
    assert counts.pop("none") >= 80
    assert set(counts) == set(checks.build.SCHEMA) - {"none"}
    assert max(counts.values()) <= 2 * median(counts.values())
    assert min(counts.values()) >= 0.5 * median(counts.values())


def test_free_text_is_copied_from_the_sentence():
    for record in RECORDS:
        for action in checks.actions_of(record):
            schema = checks.build.SCHEMA[action["action"]]
            for key, value in action.items():
                if key in ("action", "room", "door") or schema[key][0] != "text":
                    continue  # a typing error may stand in a room or a door
                assert value in record["prompt"], record


# --- leakage --------------------------------------------------------------------------


def test_no_sentence_stands_anywhere_else():
    ours = Counter(checks.plain(r["prompt"]) for r in RECORDS)
    assert max(ours.values()) == 1
    for name, records in EARLIER.items():
        assert not ours.keys() & {checks.plain(r["prompt"]) for r in records}, name


@pytest.mark.parametrize("name", EARLIER)
def test_stripped_sentences_are_new(name):
    earlier = {checks.strip_slots(r) for r in EARLIER[name]}
    assert {checks.strip_slots(r) for r in RECORDS} & earlier == set()


def test_patterns_are_no_training_patterns(rebuilt):
    """Cores, wrappers and joints, by the builder's own account, whatever the slots."""
    _, builder = rebuilt
    tools = sys.modules["second_test_build"].large
    used = {tools.anonymous(t) for r in RECORDS for t in builder.meta[r["prompt"]]}
    assert len(used) > 300
    for ending in ("", "_large", "_wide"):
        path = SOURCES / f"home_commands{ending}" / "skeletons.txt"
        text = path.read_text("utf-8")
        lines = [line[2:] for line in text.splitlines() if line[:2] in ("+ ", "- ")]
        known = {tools.anonymous(one) for t in lines for one in tools.variants(t)}
        assert len(known) > 600 and used & known == set(), ending


def test_held_out_values_are_new_and_in_their_slice_alone(rebuilt):
    pools = sys.modules["second_test_build"].small.VALUES
    held_out = {
        form
        for pool in pools.values()
        for value in pool["held_out"]
        for form in value.split("/")
    }
    assert len(held_out) > 100
    said = "\n".join(r["prompt"].casefold() for rs in EARLIER.values() for r in rs)
    assert [v for v in held_out if checks.said_in(v, said)] == []
    for record in RECORDS:
        given = {v for a in checks.actions_of(record) for v in a.values()}
        copied = [v for v in given if isinstance(v, str) and v in held_out]
        assert bool(copied) == (record["slice"] == "unseen_values"), record


def test_the_builder_refuses_what_was_said_before(rebuilt):
    _, builder = rebuilt
    assert builder.refused  # some of our lines were such, and are not used
    assert builder.said.pattern("turn on the {room} lights")
    assert builder.said.value("pantry") and builder.said.value("kitchen")
    for name in EARLIER:
        record = EARLIER[name][0]
        assert not builder.acceptable(record["prompt"], record["completion"])


def test_many_patterns_by_hand(rebuilt):
    _, builder = rebuilt
    written = defaultdict(set)
    for line in builder.skeletons:
        written[line.action if line.kind == "single" else line.kind].add(line.text)
    least = dict.fromkeys(checks.build.SCHEMA, 12)
    least |= {"none": 60, "negation": 40, "multi": 20, "wrap": 8, "join2": 5}
    for what, count in least.items():
        assert len(written[what]) >= count, what


# --- files ----------------------------------------------------------------------------


def test_the_builder_makes_this_file(rebuilt):
    files, _ = rebuilt
    assert list(files) == ["test.jsonl"]
    assert (FOLDER / "test.jsonl").read_bytes() == files["test.jsonl"].encode()


def test_data_card_has_the_hash_and_the_counts(rebuilt):
    _, builder = rebuilt
    card = (FOLDER / "README.md").read_text("utf-8")
    digest = hashlib.sha256((FOLDER / "test.jsonl").read_bytes()).hexdigest()
    row = re.search(r"`test\.jsonl` \| (\d[\d,]*) \| `([0-9a-f]{64})`", card)
    assert (int(row[1]), row[2]) == (len(RECORDS), digest)
    values = json.loads((SOURCES / FOLDER.name / "values.json").read_text("utf-8"))
    patterns = len(builder.skeletons) + len(builder.refused)
    for said in (
        f"{patterns} patterns",
        f"{sum(map(len, values.values()))} values",
        f"{len(builder.refused)} lines",
        f"{len(builder.refused_values)} values were refused",
    ):
        assert said in " ".join(card.split()), said
    assert "CC BY 4.0" in card
