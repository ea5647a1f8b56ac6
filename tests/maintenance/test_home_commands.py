"""The home-commands data set: schema, slices, leakage, balance, hashes, rebuild."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import pytest
from builders import load_file

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "home_commands"
SOURCES = ROOT / "maintenance" / "data_sets" / "home_commands"
SPLITS = ("train", "validation", "test")
SLICES = {
    "unseen_phrasing",
    "unseen_values",
    "multi_action",
    "negation",
    "typos",
    "out_of_scope",
}


build = load_file(SOURCES / "build.py", "home_commands_build")
RECORDS = {
    split: [
        json.loads(line)
        for line in (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]
    for split in SPLITS
}


def actions_of(record: dict) -> list[dict]:
    answer = json.loads(record["completion"])
    return answer.get("actions", [answer])


def problems(answer: dict) -> list[str]:
    """What the schema objects to in one parsed completion (empty: nothing)."""
    if "actions" in answer:
        several = answer["actions"]
        if list(answer) != ["actions"] or not 2 <= len(several) <= 3:
            return ["a list of two or three actions, and nothing else, was expected"]
        return [p for one in several for p in problems(one)]
    action = answer.get("action")
    if action not in build.SCHEMA or next(iter(answer)) != "action":
        return [f"unknown or misplaced action {action!r}"]
    schema, found = build.SCHEMA[action], []
    given = [key for key in answer if key != "action"]
    if given != [key for key in schema if key in given]:
        found.append("unknown arguments, or not in the schema's order")
        return found
    for key in given:
        kind, allowed = schema[key]
        value = answer[key]
        good = {
            "text": lambda v, a: isinstance(v, str) and v == v.strip() != "",
            "integer": lambda v, a: type(v) is int and a[0] <= v <= a[1],
            "choice": lambda v, a: v in a,
            "time": lambda v, a: (
                isinstance(v, str) and bool(re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", v))
            ),
        }[kind](value, allowed)
        if not good:
            found.append(f"{action}.{key}: {value!r}")
    for form in build.FORMS[action]:
        needed = {k for k in form.split() if not k.endswith("?")}
        if needed <= set(given) <= {k.rstrip("?") for k in form.split()}:
            return found
    return [*found, f"{action}: {given} do not stand together"]


# --- shape ----------------------------------------------------------------------------


def test_sizes_and_slices():
    assert len(RECORDS["train"]) >= 1200
    assert len(RECORDS["validation"]) >= 150
    counts = Counter(r["slice"] for r in RECORDS["test"])
    assert set(counts) == SLICES
    assert set(counts.values()) == {80}
    for split in ("train", "validation"):
        assert {r["slice"] for r in RECORDS[split]} == {"seen"}


@pytest.mark.parametrize("split", SPLITS)
def test_every_record_is_canonical_and_valid(split):
    for record in RECORDS[split]:
        assert list(record) == ["prompt", "completion", "slice"]
        answer = json.loads(record["completion"])
        assert record["completion"] == json.dumps(answer, ensure_ascii=False)
        assert problems(answer) == [], record
        prompt = record["prompt"]
        assert prompt == prompt.strip()
        assert 1 <= len(prompt.split()) <= 25
        assert not re.search(r"[{}\x00-\x1f]|  |\(n\)| ,|,,", prompt), prompt


@pytest.mark.parametrize(
    "bad",
    [
        {"action": "fly"},
        {"room": "hall", "action": "set_fan", "speed": "low"},
        {"action": "set_fan", "room": "hall", "speed": "fast"},
        {"action": "set_fan", "speed": "low", "room": "hall"},
        {"action": "set_fan", "room": "hall"},
        {"action": "set_alarm", "time": "24:00"},
        {"action": "set_alarm", "time": "7:00"},
        {"action": "set_timer", "minutes": "5"},
        {"action": "set_timer", "minutes": True},
        {"action": "set_light", "room": "hall", "brightness": 101},
        {"action": "set_light", "room": "hall", "state": "on", "colour": "red"},
        {"action": "none", "room": "hall"},
        {"actions": [{"action": "none"}]},
    ],
)
def test_the_validator_refuses(bad):
    assert problems(bad)


def test_completions_are_short():
    assert max(len(r["completion"]) for s in SPLITS for r in RECORDS[s]) <= 260


def test_twelve_actions_in_every_split():
    for split in SPLITS:
        names = {a["action"] for r in RECORDS[split] for a in actions_of(r)}
        assert names == set(build.SCHEMA)
    assert len(build.SCHEMA) - 1 >= 12


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_balance(split):
    """No action is more than about twice, or less than half, the median action."""
    counts = Counter(a["action"] for r in RECORDS[split] for a in actions_of(r))
    if split == "test":
        assert counts.pop("none") >= 80  # a slice of its own
    middle = median(counts.values())
    assert max(counts.values()) <= 2 * middle
    assert min(counts.values()) >= 0.5 * middle


def test_slices_are_what_they_say():
    for record in RECORDS["test"]:
        n, name = len(actions_of(record)), record["slice"]
        if name == "multi_action":
            assert n >= 2
        elif name == "out_of_scope":
            assert record["completion"] == '{"action": "none"}'
        elif name != "negation":
            assert n == 1
            assert actions_of(record)[0]["action"] != "none"
    multi = [r for r in RECORDS["test"] if r["slice"] == "multi_action"]
    assert Counter(len(actions_of(r)) for r in multi)[3] >= 8


# --- leakage --------------------------------------------------------------------------


def plain(text: str) -> str:
    return re.sub(r"[^\w%:']+", " ", text.casefold()).strip()


def test_no_prompt_twice_anywhere():
    prompts = [plain(r["prompt"]) for s in SPLITS for r in RECORDS[s]]
    assert [p for p, n in Counter(prompts).items() if n > 1] == []


NUMBER = (
    r"(?:\d+(?::\d+)?|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|"
    r"twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|"
    r"thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|half|quarters?|noon|"
    r"midnight|dozen|hours?|minutes?|o'clock|am|pm|percent|%)"
)
FILLERS = r"(?:\s+(?:and|past|to|a|an|of))*"
DAY = (
    r"\b(?:on (?:mon|tues|wednes|thurs|fri|satur|sun)day|tomorrow|every day|"
    r"every weekday|in the (?:morning|afternoon|evening)|"
    r"(?:morning|afternoon|evening) (?=at)|at night)\b"
)


def strip_slots(record: dict) -> str:
    """The sentence without its values, found from its completion alone."""
    text = re.sub(DAY, " # ", record["prompt"].casefold())
    values = {
        v.casefold()
        for a in actions_of(record)
        for k, v in a.items()
        if isinstance(v, str) and k != "action"
    }
    for value in sorted(values, key=len, reverse=True):
        if value in text:
            text = re.sub(rf"\b{re.escape(value)}\b", " # ", text)
    text = re.sub(rf"\b{NUMBER}\b|%", " # ", text)
    text = re.sub(rf"#(?:{FILLERS}\s+#)+", "#", plain_hash(text))
    return re.sub(r"\s+", " ", plain_hash(text))


def plain_hash(text: str) -> str:
    return re.sub(r"[^\w#']+", " ", text).strip()


def test_the_slot_stripper_strips():
    record = {
        "prompt": "Wake me up tomorrow at quarter past seven in the evening!",
        "completion": '{"action": "set_alarm", "time": "19:15", "day": "tomorrow"}',
    }
    other = {
        "prompt": "wake me up at 6:40 am",
        "completion": '{"action": "set_alarm", "time": "06:40"}',
    }
    assert strip_slots(record) == "wake me up # at #"
    assert strip_slots(other) == "wake me up at #"
    one = {
        "prompt": "Set the kitchen fan to low.",
        "completion": '{"action": "set_fan", "room": "kitchen", "speed": "low"}',
    }
    assert strip_slots(one) == "set the # fan to #"


def test_stripped_sentences_of_the_test_split_are_unseen():
    learned = {strip_slots(r) for s in ("train", "validation") for r in RECORDS[s]}
    shared = {strip_slots(r) for r in RECORDS["test"]} & learned
    assert shared == set()
    # The same stripper does find sentences of one pattern within the training split.
    assert len({strip_slots(r) for r in RECORDS["train"]}) < 0.8 * len(RECORDS["train"])


@pytest.fixture(scope="module")
def rebuilt():
    return build.build()


def test_skeletons_are_disjoint_and_many(rebuilt):
    """By the builder's own account: cores, wrappers and joints alike."""
    _, builder = rebuilt
    used = {
        split: {s for r in RECORDS[split] for s in builder.meta[r["prompt"]]}
        for split in SPLITS
    }
    assert used["test"] & (used["train"] | used["validation"]) == set()
    written: dict[str, set] = defaultdict(set)
    for skeleton in builder.skeletons:
        if skeleton.kind in ("single", "negation") and skeleton.split == "train":
            written[skeleton.action].add(skeleton.text)
    for action in build.SCHEMA:
        in_use = written[action] & used["train"]
        assert len(in_use) >= 15, (action, len(in_use))


def said_in(value: str, text: str) -> bool:
    value = value.casefold()  # most values stand nowhere: no search for these
    return value in text and re.search(rf"\b{re.escape(value)}\b", text) is not None


def test_held_out_values_are_new():
    learned = "\n".join(
        r["prompt"].casefold() for s in ("train", "validation") for r in RECORDS[s]
    )
    held_out = {
        form
        for pools in build.VALUES.values()
        for value in pools["held_out"]
        for form in value.split("/")
    }
    assert [v for v in held_out if said_in(v, learned)] == []
    for record in RECORDS["test"]:
        given = {v for a in actions_of(record) for v in a.values()}
        copied = [v for v in given if isinstance(v, str) and v in held_out]
        assert bool(copied) == (record["slice"] == "unseen_values"), record


def test_free_text_is_copied_from_the_sentence():
    """Names, titles, items and messages stand in the sentence, letter for letter."""
    for split in SPLITS:
        for record in RECORDS[split]:
            for action in actions_of(record):
                for key, value in action.items():
                    if key == "action" or build.SCHEMA[action["action"]][key][0] != (
                        "text"
                    ):
                        continue
                    # A typing error may stand in a room or a door; "all" is not said.
                    if key in ("room", "door") or value == "all":
                        continue
                    assert value in record["prompt"], record


# --- numbers in words -----------------------------------------------------------------


def test_numbers_and_times_in_words():
    import random

    assert build.words(0) == "zero"
    assert build.words(21) == "twenty-one"
    assert build.words(225) == "two hundred and twenty-five"
    said = {build.time_phrase(random.Random(i), 19, 15) for i in range(200)}
    assert "quarter past seven in the evening" in said
    assert "19:15" in said
    assert not said & {"quarter past seven", "7:15", "seven fifteen"}
    to = {build.time_phrase(random.Random(i), 12, 45) for i in range(200)}
    assert "quarter to one in the afternoon" in to
    long = {build.duration_phrase(random.Random(i), 90) for i in range(200)}
    assert {"an hour and a half", "90 minutes", "ninety minutes"} <= long


# --- files ----------------------------------------------------------------------------


def test_the_builder_makes_these_files(rebuilt):
    files, _ = rebuilt
    for name, text in files.items():
        assert (FOLDER / name).read_bytes() == text.encode("utf-8"), name


def test_check_option_sees_a_changed_file(tmp_path):
    sources = tmp_path / "maintenance" / "data_sets" / "home_commands"
    built = tmp_path / "data" / "home_commands"
    shutil.copytree(SOURCES, sources)
    shutil.copytree(FOLDER, built)
    command = [sys.executable, str(sources / "build.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    changed = built / "validation.jsonl"
    changed.write_bytes(changed.read_bytes()[:-2] + b" \n")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "validation.jsonl" in result.stdout


def test_data_card_has_the_hash_and_the_counts_of_each_file():
    card = (FOLDER / "README.md").read_text("utf-8")
    for split in SPLITS:
        data = (FOLDER / f"{split}.jsonl").read_bytes()
        row = re.search(rf"`{split}\.jsonl`.*?(\d[\d,]*).*?`([0-9a-f]{{64}})`", card)
        assert row, split
        assert int(row[1].replace(",", "")) == len(RECORDS[split])
        assert row[2] == hashlib.sha256(data).hexdigest()
    assert "CC BY 4.0" in card


def test_schema_text_and_card_name_every_argument():
    text = (FOLDER / "schema.txt").read_text("utf-8")
    card = (FOLDER / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 25
    for action, arguments in build.SCHEMA.items():
        if action == "none":
            assert '{"action": "none"}' in text
            continue
        line = re.search(rf"^{action}: (.*)$", text, re.M)[1]
        row = re.search(rf"^\| `{action}` \|(.*)$", card, re.M)[1]
        for key, (kind, allowed) in arguments.items():
            assert re.search(rf"\b{key}\b", line), (action, key)
            assert f"`{key}`" in row, (action, key)
            if kind == "choice" and key != "day":
                assert all(re.search(rf"\b{v}\b", line) for v in allowed)


def test_few_shot_examples_are_from_train():
    shots = json.loads((FOLDER / "few_shot.json").read_text("utf-8"))
    train = {(r["prompt"], r["completion"]) for r in RECORDS["train"]}
    assert len(shots) == 3
    assert all((s["prompt"], s["completion"]) in train for s in shots)
    kinds = [json.loads(s["completion"]) for s in shots]
    assert any("actions" in k for k in kinds)
    assert any(k.get("action") == "none" for k in kinds)
