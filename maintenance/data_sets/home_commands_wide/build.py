"""Build the wide training set of the home commands.

    python maintenance/data_sets/home_commands_wide/build.py [--check]

It writes train.jsonl; with --check it compares the file with its rebuild.

The task, the forms and the way in which a sentence is made are those of the small and
of the large set, whose builders this script loads. Here stand more patterns
(skeletons.txt), more values (values.json), invented words among the values, and another
mixture: more sentences of several commands, with negations and with typing errors.
What the validation and test splits of home_commands keep for themselves is refused by
code, as there. Standard library only; always the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
LARGE = FOLDER.parent / "home_commands_large"
DATA = FOLDER.parents[2] / "data"
SEED = 20261128
SIZES = {
    "unseen_phrasing": 6000,
    "multi_action": 4700,
    "negation": 3400,
    "typos": 3400,
    "out_of_scope": 1700,
}


def load_large_builder() -> ModuleType:
    """A copy of home_commands_large/build.py of our own, to widen."""
    name = "home_commands_large_build_for_wide"
    spec = importlib.util.spec_from_file_location(name, LARGE / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:  # no __pycache__ among the data
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


large = load_large_builder()
small = large.small

# --- values ---------------------------------------------------------------------------


def add_values() -> None:
    """Let the lists of values.json come to those of the large set."""
    wide = json.loads((FOLDER / "values.json").read_text(encoding="utf-8"))
    for slot, values in wide.items():
        pool = large.VALUES[slot]["seen"]
        new = [v for v in values if not large.holds_a_held_out_value(v)]
        pool[:] = dict.fromkeys([*pool, *new])
    large.use_wide_parts()  # two of the pools are copied there
    small.SEED = SEED


# --- invented words -------------------------------------------------------------------

ONSETS = re.findall(
    "[a-z]+", "b br d dr f fl g gr h j k kl l m n p pl r s sk st t tr v w z th sh"
)
VOWELS = re.findall("[a-z]+", "a a e e i i o o u ai ea ee ou")
CODAS = ["", "", "", "l", "m", "n", "r", "s", "nd", "rn", "lt"]
OFFENSIVE = re.compile("rap|naz|fu[ck]|sh[ie]t|tit|pis|ass|sex|cum|slu|jap|goo|gip")


def invent(rng) -> str:
    """A word that nobody has heard, of two or three syllables: "fleanor"."""
    while True:
        count = rng.choice([2, 2, 3])
        parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)]
        word = "".join(parts) + rng.choice(CODAS)
        if not OFFENSIVE.search(word) and not large.holds_a_held_out_value(word):
            return word


def invented_value(slot: str, rng) -> str:
    """A value of this slot with an invented word in it, to be copied letter by letter.

    Raises:
        KeyError: no value of this slot is invented.
    """
    word, name = invent(rng), rng.choice(large.VALUES["person"]["seen"]).split()[-1]
    forms = {
        "room": [f"{word} room", f"{word} corner", word],
        "door": [f"{word} door", f"{word} gate"],
        "name": [word, f"{word} bread"],
        "person": [word.capitalize(), f"Uncle {word.capitalize()}"],
        "scene": [word, f"{word} evening"],
        "title": [word.capitalize(), f"Letters to {word.capitalize()}"],
        "artist": [f"{name} {word.capitalize()}", f"The {word.capitalize()}s"],
        "genre": [f"{word} rock", word],
    }
    return rng.choice(forms[slot])


INVENTED = {"room", "door", "name", "person", "scene", "title", "artist", "genre"}
large_draw = large.draw


def draw(slot: str, rng, pool: str) -> tuple[str, dict]:
    """As in the large set; one value in twenty is invented."""
    if slot in INVENTED and pool != "common" and rng.random() < 0.05:
        value = invented_value(slot, rng)
        key = {"person": "to"}.get(slot, slot)
        keep = slot in ("room", "door")  # as there: no typing error in these
        return (f"\x01{value}\x02" if keep else value), {key: value}
    return large_draw(slot, rng, pool)


# --- the builder ----------------------------------------------------------------------


class WideBuilder(large.LargeBuilder):
    def __init__(self) -> None:
        super().__init__()
        self.admit(small.read_skeletons(FOLDER / "skeletons.txt", every=0))
        text = (DATA / LARGE.name / "train.jsonl").read_text(encoding="utf-8")
        for line in text.splitlines():
            self.prompts.add(large.sentence_key(json.loads(line)["prompt"]))

    def join(self, kind: str, split: str, parts: list):
        """As elsewhere; our joints have slots of their own: "{1}, {x_person} says"."""
        draft = super().join(kind, split, parts)
        draft.text, _ = small.fill(draft.text, self.rng, "seen", {})
        return draft


add_values()
small.draw = draw


def build() -> tuple[dict[str, str], WideBuilder]:
    """Every generated file's text by name, and the builder that made it."""
    builder = WideBuilder()
    records = builder.split("train", SIZES)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return {"train.jsonl": "\n".join(lines) + "\n"}, builder


if __name__ == "__main__":
    sys.exit(small.main(sys.argv[1:], DATA / FOLDER.name, build))
