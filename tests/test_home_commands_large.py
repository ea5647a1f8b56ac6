"""The large training set of the home commands: schema, leakage, balance, rebuild."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
SMALL, LARGE = DATA / "home_commands", DATA / "home_commands_large"
SPLITS = ("train", "validation", "test")


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:  # no __pycache__ among the data
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# The checks of the small set, applied to this one.
checks = _load(Path(__file__).with_name("test_home_commands.py"), "small_set_checks")
build = _load(LARGE / "build.py", "home_commands_large_build")
TRAIN = _read(LARGE / "train.jsonl")
OTHERS = {split: _read(SMALL / f"{split}.jsonl") for split in SPLITS}
PROMPTS = {record["prompt"] for record in TRAIN}


@pytest.fixture(scope="module")
def rebuilt():
    return build.build()


# --- shape ----------------------------------------------------------------------------


def test_size():
    assert 14_000 <= len(TRAIN) <= 18_000
    assert (LARGE / "train.jsonl").stat().st_size <= 3_000_000


def test_every_record_is_canonical_valid_and_short():
    for record in TRAIN:
        assert list(record) == ["prompt", "completion", "slice"]
        assert record["slice"] == "seen"
        answer = json.loads(record["completion"])
        assert record["completion"] == json.dumps(answer, ensure_ascii=False)
        assert checks.problems(answer) == [], record
        assert len(record["completion"]) <= 260
        prompt = record["prompt"]
        assert prompt == prompt.strip()
        most = 24 if len(checks.actions_of(record)) == 3 else 22
        assert 1 <= len(prompt.split()) <= most
        assert not re.search(r"[{}\[\]|\x00-\x1f]|  |\(n\)| ,|,,", prompt), prompt


def test_balance_of_actions():
    counts = Counter(a["action"] for r in TRAIN for a in checks.actions_of(r))
    shares = {name: n / counts.total() for name, n in counts.items()}
    assert set(shares) == set(build.small.SCHEMA)
    assert 0.10 <= shares.pop("none") <= 0.20
    assert min(shares.values()) >= 0.04, shares
    assert max(shares.values()) <= 2.2 * min(shares.values()), shares


def test_values_are_many_and_evenly_drawn():
    said = defaultdict(Counter)
    for record in TRAIN:
        for action in checks.actions_of(record):
            for key, value in action.items():
                said[key][value] += 1
    for key in ("room", "door", "colour", "name", "item", "to", "title", "artist"):
        assert len(said[key]) >= 150, key
        assert len(said[key]) >= 0.1 * said[key].total(), key
    old = set(checks.build.VALUES["room"]["seen"])
    rooms = {room: n for room, n in said["room"].items() if room != "all"}
    assert sum(n for room, n in rooms.items() if room in old) < 0.2 * sum(
        rooms.values()
    )


def test_free_text_is_copied_from_the_sentence():
    """Rooms and doors too, unless they are everyday ones, which a typo may hit."""
    for record in TRAIN:
        for action in checks.actions_of(record):
            for key, value in action.items():
                if key == "action" or value == "all" or value in build.EVERYDAY:
                    continue
                if build.small.SCHEMA[action["action"]][key][0] == "text":
                    assert value in record["prompt"], record


def test_many_patterns_by_hand():
    written = defaultdict(set)
    for line in build.small.read_skeletons(LARGE / "skeletons.txt", every=0):
        single = line.kind == "single"
        written[line.action if single else line.kind].add(line.text)
    for action in build.small.SCHEMA:
        assert len(written[action]) >= (150 if action == "none" else 40), action
    for kind, least in {"negation": 120, "multi": 100, "wrap": 60, "join2": 20}.items():
        assert len(written[kind]) >= least, kind


# --- leakage --------------------------------------------------------------------------


def test_no_prompt_twice_anywhere():
    records = [*TRAIN, *(r for split in SPLITS for r in OTHERS[split])]
    prompts = Counter(checks.plain(r["prompt"]) for r in records)
    assert [p for p, n in prompts.items() if n > 1] == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_stripped_sentences_are_unseen(split):
    learned = {checks.strip_slots(r) for r in TRAIN}
    assert {checks.strip_slots(r) for r in OTHERS[split]} & learned == set()


def test_patterns_of_validation_and_test_are_unused(rebuilt):
    """Cores, wrappers and joints, by the builder's own account, whatever the slots."""
    _, builder = rebuilt
    ours = {build.anonymous(s) for prompt in PROMPTS for s in builder.meta[prompt]}
    of_split = defaultdict(set)
    for line in build.small.read_skeletons():
        of_split[line.split].add(build.anonymous(line.text))
    assert of_split["test"] and of_split["test"] & ours == set()
    assert of_split["validation"] and of_split["validation"] & ours == set()
    assert len(of_split["train"] & ours) > 300  # the old training patterns are there


def test_longer_patterns_of_test_are_no_part_of_ours(rebuilt):
    _, builder = rebuilt
    ours = {f" {build.anonymous(s)} " for p in PROMPTS for s in builder.meta[p]}
    everything = "|".join(ours)
    for line in build.small.read_skeletons():
        key = build.anonymous(line.text)
        if line.split == "test" and len(key.replace("#", "").split()) > 2:
            assert f" {key} " not in everything, key


def test_the_builder_refuses_what_leaks(rebuilt):
    _, builder = rebuilt
    test = next(s for s in build.small.read_skeletons() if s.split == "test")
    assert builder.reserved.pattern(test.text)
    assert builder.refused  # some of our lines were such, and are not used
    record = OTHERS["test"][0]
    assert not builder.acceptable(record["prompt"], record["completion"])
    assert not builder.acceptable("vacuum the pantry", '{"action": "none"}')


def test_held_out_values_are_new():
    learned = "\n".join(r["prompt"].casefold() for r in TRAIN)
    assert len(build.HELD_OUT) > 80
    assert [v for v in build.HELD_OUT if checks.said_in(v, learned)] == []
    drawn = [
        v for pools in build.VALUES.values() for pool in pools.values() for v in pool
    ]
    assert not checks.said_in("pantry", "\n".join(drawn).casefold())


# --- spoken forms and typing errors ---------------------------------------------------


def test_spoken_times_mean_what_is_written():
    import random

    def said(h: int, m: int) -> set[str]:
        return {build.time_phrase(random.Random(i), h, m) for i in range(600)}

    assert {"19:15", "7:15pm", "7.15 pm", "nineteen fifteen"} <= said(19, 15)
    assert "a quarter past seven in the evening" in said(19, 15)
    assert {"five to eight in the morning", "07:55"} <= said(7, 55)
    assert "seven oh five am" in said(7, 5)
    assert {"7pm", "seven in the evening"} <= said(19, 0)
    assert said(12, 0) == {"noon"}
    for h in (5, 9, 10, 12, 16, 23):  # each says which half of the day it means
        for m in (0, 7, 15, 35, 48):
            for phrase in said(h, m):
                half = r"[ap]m$|^noon$| in the (morning|afternoon|evening)$| at night$"
                clock = re.search(r"^0\d:\d\d$|^(1[3-9]|2\d):\d\d$", phrase)
                assert clock or re.search(half, phrase) or h > 12, phrase


def test_spoken_durations():
    import random

    long = {build.duration_phrase(random.Random(i), 80) for i in range(600)}
    assert {"1 hr 20 min", "an hour and twenty minutes", "80 minutes"} & long
    assert not any(re.search(r"\bone hours|\b1 hours|one minutes", p) for p in long)
    assert {build.duration_phrase(random.Random(i), 1) for i in range(99)} == {
        "a minute",
        "one minute",
        "1 minute",
    }


def test_wordings_are_spelt_out():
    assert build.variants("[cut|kill] the [lamp|]") == [
        "cut the lamp",
        "cut the",
        "kill the lamp",
        "kill the",
    ]


# --- files ----------------------------------------------------------------------------


def test_the_builder_makes_this_file(rebuilt):
    files, _ = rebuilt
    assert list(files) == ["train.jsonl"]
    assert (LARGE / "train.jsonl").read_bytes() == files["train.jsonl"].encode()


def test_check_option_sees_a_changed_file(tmp_path, rebuilt):
    files, builder = rebuilt
    made = lambda: (files, builder)  # noqa: E731
    path = tmp_path / "train.jsonl"
    path.write_bytes((LARGE / "train.jsonl").read_bytes())
    assert build.small.main(["--check"], tmp_path, made) == 0
    path.write_bytes(path.read_bytes()[:-2] + b" \n")
    assert build.small.main(["--check"], tmp_path, made) == 1


def test_data_card_has_the_hash_and_the_count():
    card = (LARGE / "README.md").read_text("utf-8")
    digest = hashlib.sha256((LARGE / "train.jsonl").read_bytes()).hexdigest()
    row = re.search(r"`train\.jsonl` \| (\d[\d,]*) \| `([0-9a-f]{64})`", card)
    assert (int(row[1].replace(",", "")), row[2]) == (len(TRAIN), digest)
    assert "CC BY 4.0" in card
