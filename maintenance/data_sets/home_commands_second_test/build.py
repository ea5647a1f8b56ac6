"""Build the second test set of the home commands.

    python maintenance/data_sets/home_commands_second_test/build.py [--check]

It writes test.jsonl; with --check it compares the file with its rebuild.

The task, the forms, the slices and their sizes are those of the first test set, whose
builder home_commands/build.py this script loads as it is. Here stand other
patterns (skeletons.txt) and other held-out values (values.json). What any of the
training sets, the validation split or the first test split says already is refused by
code. Standard library only; always the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
SMALL, LARGE, WIDE = (
    FOLDER.parent / f"home_commands{ending}" for ending in ("", "_large", "_wide")
)
DATA = FOLDER.parents[2] / "data"
SEED = 20261129
SIZES = dict.fromkeys(
    (
        "unseen_phrasing",
        "unseen_values",
        "multi_action",
        "negation",
        "typos",
        "out_of_scope",
    ),
    80,
)


def load_builder(folder: Path) -> ModuleType:
    """A copy of that folder's build.py of our own."""
    name = f"{folder.name}_build_for_second_test"
    spec = importlib.util.spec_from_file_location(name, folder / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:  # no __pycache__ among the data
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


small = load_builder(SMALL)
large = load_builder(LARGE)  # for its tools alone: it draws from a copy of its own

# --- what has been said already -------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


class Said:
    """The sentences, the patterns and the words of every other split.

    Attributes:
        sentences: all prompts, as `large.sentence_key` writes them.
        stripped: all sentences without their values, numbers, times and days.
        patterns: all wordings of all patterns, wrappers and joints, without slots.
    """

    def __init__(self) -> None:
        files = [
            DATA / SMALL.name / f"{split}.jsonl"
            for split in ("train", "validation", "test")
        ]
        files += [DATA / folder.name / "train.jsonl" for folder in (LARGE, WIDE)]
        records = [json.loads(line) for path in files for line in lines_of(path)]
        self.sentences = {large.sentence_key(r["prompt"]) for r in records}
        self.stripped = {large.stripped(r["prompt"], r["completion"]) for r in records}
        self.patterns = {
            large.anonymous(wording)
            for folder in (SMALL, LARGE, WIDE)
            for line in small.read_skeletons(folder / "skeletons.txt", every=0)
            for wording in large.variants(line.text)
        }
        self.joined = "|".join(f" {pattern} " for pattern in sorted(self.patterns))
        said = "\n".join(r["prompt"] for r in records).casefold()
        self.words = f" {' '.join(re.sub(r'[^a-z0-9]+', ' ', said).split())} "

    def pattern(self, text: str) -> bool:
        """Whether a pattern is there, or, if longer, a part of one that is there."""
        key = large.anonymous(text)
        longer = len(key.replace("#", "").split()) > 2
        return key in self.patterns or (longer and f" {key} " in self.joined)

    def value(self, value: str) -> bool:
        """Whether any sentence says it, "singular/plural" in either form."""
        forms = (re.sub(r"[^a-z0-9]+", " ", v.casefold()) for v in value.split("/"))
        return any(f" {form.strip()} " in self.words for form in forms)


# --- the builder ----------------------------------------------------------------------


class SecondBuilder(small.Builder):
    def __init__(self) -> None:
        self.said = Said()
        ours = json.loads((FOLDER / "values.json").read_text(encoding="utf-8"))
        self.refused_values = [
            v for values in ours.values() for v in values if self.said.value(v)
        ]
        small.SEED = SEED
        small.VALUES = {
            slot: {
                "seen": pools["seen"],
                "held_out": [v for v in ours[slot] if v not in self.refused_values],
            }
            for slot, pools in small.VALUES.items()
        }
        super().__init__()
        lines = small.read_skeletons(FOLDER / "skeletons.txt", every=0)
        self.refused = [line.text for line in lines if self.said.pattern(line.text)]
        self.skeletons = [line for line in lines if line.text not in self.refused]
        self.known |= set(re.findall(r"[a-z']+", " ".join(s.text for s in lines)))
        self.known |= {"hat", "bot"}  # a typing error that makes another word
        self.prompts |= self.said.sentences

    def add(self, out, make, split: str, name: str, typos: bool = False) -> None:
        """Every eighth sentence of several commands has three."""
        several = sum(record["slice"] == "multi_action" for record in out)
        self.three_due = several % 8 == 0
        super().add(out, make, split, name, typos)

    def multi(self, split: str):
        draft = super().multi(split)
        while self.three_due and len(draft.actions) < 3:
            draft = super().multi(split)
        return draft

    def join(self, kind: str, split: str, parts: list):
        """As in the first test; our joints may have a slot: "{x_person} says"."""
        draft = super().join(kind, split, parts)
        draft.text, _ = small.fill(draft.text, self.rng, "seen", {})
        return draft

    def acceptable(self, prompt: str, completion: str) -> bool:
        return (
            super().acceptable(prompt, completion)
            and len(completion) <= large.MAX_CHARACTERS
            and large.stripped(prompt, completion) not in self.said.stripped
        )


def build() -> tuple[dict[str, str], SecondBuilder]:
    """Every generated file's text by name, and the builder that made it."""
    builder = SecondBuilder()
    records = builder.split("test", SIZES)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return {"test.jsonl": "\n".join(lines) + "\n"}, builder


if __name__ == "__main__":
    sys.exit(small.main(sys.argv[1:], DATA / FOLDER.name, build))
