"""Load a data set: a bundled one, the reader's own file or folder, or one from a hub.

Whatever its columns are called, a set leaves here as a `datasets.Dataset` with
`prompt` and `completion`, or with `messages`; a record that cannot be used raises
`DataError`, which says where it stands and what to do. Nothing is dropped silently.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from course_utils.data_files import READERS, DataError, Record, describe, read_records
from course_utils.runtime import data_folder
from course_utils.templates import first_misplaced_turn

if TYPE_CHECKING:
    import datasets

__all__ = ["SPLITS", "DataError", "data_hash", "load_examples"]

SPLITS = ("train", "validation", "test")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def load_examples(
    source: str | Path,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Load one split of a data set, checked and with the course's column names.

    Recognised columns: prompt + completion; messages (role, content); conversations
    (from, value); instruction + output, with or without input; text + label.
    Instruction and input joined by an empty line become the prompt; a label's name, or
    else its number, becomes the completion. All original columns are kept.

    Args:
        source: A bundled set's name; a .jsonl, .json, .csv or .parquet file; a folder
            with train.jsonl, validation.jsonl and test.jsonl, or some of them; or a
            hub id, "org/name" or "org/name:configuration".
        split: "train", "validation", "test", or "all" of them. An own file is split
            80/10/10 by a hash of the prompt: equal prompts stay together, and a record
            never moves when others are added.
        limit: At most this many records, in an order that `seed` gives; without
            `limit` the file's order is kept.

    Raises DataError: the source, the split or a record cannot be used.

    >>> examples = load_examples("general_questions", "test", limit=3)
    >>> sorted(examples.column_names)
    ['answer', 'answers', 'completion', 'prompt']
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a positive whole number, not {limit!r}")
    place = _locate(source)
    if place is None:
        return _as_dataset(_normalise(_read_hub(str(source), split, limit, seed)))
    records = _read_split(place, str(source), split)
    if limit is not None:
        records = [records[i] for i in _order(len(records), seed)[:limit]]
    return _as_dataset(records)


def data_hash(source: str | Path) -> str:
    """SHA-256 (64 hex digits) of a file, or of a folder's split files and their names.

    Raises DataError: there is no such set or file, or it is on a hub.
    """
    place = _locate(source)
    if place is None:
        cure = "Record the revision of a hub set instead."
        raise DataError("a hub id", "a set, folder or file", cure, file=source)
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    listing = ""
    for name, path in sorted(_split_files(place, str(source)).items()):
        listing += f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    return hashlib.sha256(listing.encode()).hexdigest()


# --- where a set lies ---


def _bundled_sets() -> list[str]:
    root = data_folder()
    folders = {path.parent for path in root.rglob("*.jsonl") if path.stem in SPLITS}
    return sorted(folder.relative_to(root).as_posix() for folder in folders)


def _locate(source: str | Path) -> Path | None:
    """The file or folder that `source` names; None for a hub id."""
    name, bundled = str(source), _bundled_sets()
    if isinstance(source, str) and name.strip("/") in bundled:
        return data_folder() / name.strip("/")
    path = Path(name).expanduser()
    if path.exists():
        return path
    is_path = isinstance(source, Path) or name.startswith((".", "/", "~"))
    is_file = path.suffix.lower() in (*READERS, ".txt", ".tsv", ".xlsx", ".gz")
    if is_path or is_file or "\\" in name or name.count("/") > 1:
        cure = _cure_for_missing(path)
        raise DataError("no such file", "an existing file", cure, file=path)
    if _HUB_ID.fullmatch(name):
        return None
    cure = _did_you_mean(name, bundled)
    cure = cure or "A file needs its ending (my.jsonl), a hub id its owner (org/name)."
    expected = "one of " + ", ".join(bundled)
    raise DataError(f"no bundled set named {name!r}", expected, cure)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def _cure_for_missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either: check the path."
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if Path(name).suffix.lower() in READERS]
    listing = f"The data files in {folder.resolve()}: {', '.join(files[:5]) or 'none'}."
    return _did_you_mean(path.name, names) or listing


def _split_files(folder: Path, name: str) -> dict[str, Path]:
    """The file of each split in a folder, errors naming it `name`.

    A folder's shared_splits.json lists files of other folders that are its own, too.
    """
    paths = sorted(folder.iterdir())
    shared = folder / "shared_splits.json"
    if shared.is_file():
        listed = json.loads(shared.read_text(encoding="utf-8"))
        paths += [folder / path for path in listed]
    files: dict[str, Path] = {}
    for path in paths:
        if path.stem not in SPLITS or path.suffix.lower() not in READERS:
            continue
        other = files.setdefault(path.stem, path)
        if other is not path:
            fault, cure = f"{other.name} and {path.name}", "Delete or move one of them."
            raise DataError(fault, "one file for each split", cure, file=name)
    if not files:
        fault = "a folder without train, validation or test files"
        cure = "Name one of its files instead, or rename them so."
        raise DataError(fault, "train.jsonl or its like", cure, file=name)
    return {split: files[split] for split in SPLITS if split in files}


def _read_split(place: Path, name: str, split: str) -> list[Record]:
    """A folder's files of a split, or the part of one file that its hashes give."""
    is_folder = place.is_dir()
    files = _split_files(place, name) if is_folder else dict.fromkeys(SPLITS, place)
    if split not in (*files, "all"):
        expected = "one of " + ", ".join(map(repr, (*files, "all")))
        cure = f"Write load_examples({name!r}, {next(iter(files))!r})."
        raise DataError(f"no split {split!r}", expected, cure, file=name)
    if is_folder:
        paths = list(files.values()) if split == "all" else [files[split]]
        return _normalise([record for path in paths for record in read_records(path)])
    records = _normalise(read_records(place))
    part = [r for r in records if split in ("all", _hash_split(r.fields))]
    if not part:
        fault = f"none of its {len(records)} records in the split {split!r}"
        expected = "at least one (a file splits 80/10/10 by a hash of the prompt)"
        cure = "Add records, ask for 'all', or make a folder of train.jsonl and others."
        raise DataError(fault, expected, cure, file=name)
    return part


def _hash_split(fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt") if "completion" in fields else None
    if prompt is None:  # a chat: what the user says first
        turns = fields["messages"]
        prompt = next(turn["content"] for turn in turns if turn["role"] == "user")
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def _order(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _read_hub(name: str, split: str, limit: int | None, seed: int) -> list[Record]:
    import datasets

    repository, configuration = _HUB_ID.fullmatch(name).groups()
    try:
        loaded = datasets.load_dataset(repository, configuration, split=split)
    except Exception as error:  # each hub client and version raises its own kinds
        reason = " ".join(str(error).split())[:200]
        fault = f"no data set that loads ({type(error).__name__}: {reason})"
        expected = "a hub id org/name or org/name:configuration, and its split"
        cure = "Check the network, the id and the split; bundled sets need no network: "
        cure += ", ".join(_bundled_sets()) + "."
        raise DataError(fault, expected, cure, file=name) from error
    if limit is not None:
        loaded = loaded.select(_order(len(loaded), seed)[:limit])
    rows = loaded.to_list()
    names = getattr(loaded.features.get("label"), "names", None)
    if names and "label_text" not in loaded.features:
        for row in rows:
            if row["label"] in range(len(names)):
                row["label_text"] = names[row["label"]]
    return [Record(name, line, "row", row) for line, row in enumerate(rows, start=1)]


# --- which columns it has: the first record decides, all others must follow ---


class _Schema(NamedTuple):
    needed: tuple[str, ...]
    convert: Callable[[Record], dict[str, Any]]  # checks a record, renames its fields

    def __str__(self) -> str:
        return " + ".join(self.needed)

    def fits(self, record: Record) -> bool:
        return all(record.fields.get(name) is not None for name in self.needed)


def _normalise(records: list[Record]) -> list[Record]:
    """The same records with `prompt` and `completion`, or with `messages`."""
    if not records:
        raise DataError("no record", "at least one", "Add records.")
    schema = _recognise(records[0])
    normalised = []
    for record in records:
        for name in schema.needed:
            if name not in record.fields:
                raise _no_field(record, name, schema, records[0])
        normalised.append(record._replace(fields=schema.convert(record)))
    if "label" in schema.needed and records[0].file.lower().endswith(".csv"):
        _number_labels(normalised)
    return normalised


def _number_labels(records: list[Record]) -> None:
    """Make numbers of a CSV file's labels, all texts, where each is a plain number.

    Codes with leading zeros stay texts: "0111" and "111" are two classes.
    """
    labels = [str(record.fields["label"]) for record in records]
    if all(label.isdecimal() and str(int(label)) == label for label in labels):
        for record, label in zip(records, labels, strict=True):
            record.fields["label"] = int(label)


def _recognise(record: Record) -> _Schema:
    whole = [schema for schema in _SCHEMAS if schema.fits(record)]
    half = [s for s in _SCHEMAS if not record.fields.keys().isdisjoint(s.needed)]
    if whole or half:  # what is missing of a half one is said later
        return (whole or half)[0]
    known = {name for schema in _SCHEMAS for name in schema.needed}
    renames = []
    for name in record.fields:
        near = difflib.get_close_matches(name.strip().lower(), known, n=1, cutoff=0.8)
        renames += [f"{name!r} to {near[0]!r}"] if near else []
    names = ", ".join(map(repr, record.fields))
    fault = f"the fields {names}" if names else "no fields"
    expected = "one of " + ", ".join(map(str, _SCHEMAS))
    cure = f"Rename {', '.join(renames) or 'the fields to one of these'}."
    raise record.error(None, fault, expected, cure)


def _no_field(record: Record, name: str, schema: _Schema, first: Record) -> DataError:
    other = next((other for other in _SCHEMAS if other.fits(record)), None)
    if other and record is not first:
        expected = f"{schema}, as in {first.unit} {first.line}"
        cure = "Put each kind of record into a file of its own."
        return record.error(None, f"a record with {other}", expected, cure)
    near = difflib.get_close_matches(name, list(record.fields), n=1, cutoff=0.6)
    cure = f"Rename {near[0]!r} to {name!r}." if near else f"Add {name!r}."
    names = ", ".join(map(repr, record.fields)) or "no fields"
    fault = f"no field {name!r}, only {names}"
    return record.error(name, fault, f"a field {name!r}", cure)


def _check_text(record: Record, column: str, value: Any) -> str:
    """`value` if it is a usable text, or else an error about `column`."""
    cure = "Write one, or delete the record."
    if not isinstance(value, str):
        if isinstance(value, int | float):
            cure = "Put it in double quotes."
        raise record.error(column, describe(value), "a text", cure)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fault = f"half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        cure = "Write the character itself, or both halves of its escape."
        raise record.error(column, fault, "whole characters", cure) from None
    if not value.strip() and column != "input":
        is_answer = column in ("completion", "output")
        expected = "a text with something " + ("to learn" if is_answer else "in it")
        raise record.error(column, describe(value), expected, cure)
    return value


def _from_pair(record: Record) -> dict[str, Any]:
    for name in ("prompt", "completion"):
        _check_text(record, name, record.fields[name])
    return record.fields


def _from_alpaca(record: Record) -> dict[str, Any]:
    fields = dict(record.fields)
    if fields.get("input") is None:
        fields["input"] = ""
    names = ("instruction", "input", "output")
    instruction, context, answer = (_check_text(record, n, fields[n]) for n in names)
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {**fields, "prompt": prompt, "completion": answer}


def _from_classification(record: Record) -> dict[str, Any]:
    text = _check_text(record, "text", record.fields["text"])
    label = record.fields["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        expected, cure = "a whole number from 0 or a name", "Write one of the two."
        raise record.error("label", describe(label), expected, cure)
    if isinstance(label, int) and label < 0:
        cure = "This split has no labels: use another."
        raise record.error("label", describe(label), "a number from 0", cure)
    name = record.fields.get("label_text")
    completion = _check_text(record, "label", str(label) if name is None else name)
    return {**record.fields, "prompt": text, "completion": completion}


_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_CHATS = {  # by column: a turn's fields, and its roles' names
    "messages": ("role", "content", _ROLES),
    "conversations": ("from", "value", _SHAREGPT_ROLES),
}
_ROLE_HINTS = _ROLES | _SHAREGPT_ROLES | dict.fromkeys(("bot", "ai"), "assistant")


def _from_chat(record: Record, column: str) -> dict[str, Any]:
    turns = record.fields[column]
    role_key, text_key, roles = _CHATS[column]
    if not isinstance(turns, list):
        cure = f'Write [{{"{role_key}": "...", "{text_key}": "..."}}, ...].'
        if record.file.lower().endswith(".csv"):
            cure = "A CSV cell cannot hold a list: use .jsonl."
        raise record.error(column, describe(turns), "a list of turns", cure)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            fault = f"turn {number}, {describe(turn)}"
            if isinstance(turn, dict) and turn:
                fault += " with " + ", ".join(map(repr, turn))
            expected = f"an object with {role_key!r} and {text_key!r}"
            raise record.error(column, fault, expected, "Rename or add the fields.")
        name = turn[role_key]
        if not isinstance(name, str) or name not in roles:
            hint = _ROLE_HINTS.get(str(name).strip().lower())
            cure = "Rename the role, or delete the turn."
            if hint and roles is _ROLES:
                cure = f"Write {hint!r} instead."
            fault, expected = f"the role {name!r} in turn {number}", ", ".join(roles)
            raise record.error(column, fault, f"one of {expected}", cure)
        text = _check_text(record, f"{column}[{number}].{text_key}", turn[text_key])
        messages.append({"role": roles[name], "content": text})
    if fault := _fault_of_order([message["role"] for message in messages]):
        raise record.error(column, *fault)
    return record.fields | ({} if column == "messages" else {"messages": messages})


def _fault_of_order(roles: list[str]) -> tuple[str, str, str] | None:
    """What is wrong with the order of the turns, what is expected, and the cure."""
    wrong = first_misplaced_turn(roles)
    if not roles:
        return "a list without a turn", "at least two turns", "Delete the record."
    if wrong is None and "assistant" not in roles:
        return "no assistant turn", "at least one, to learn from", "Add the answer."
    if wrong is None and roles[-1] == "user":
        fault = f"the user's turn last (turn {len(roles)})"
        return fault, "an assistant turn last", "Add the answer, or delete that turn."
    if wrong is None:
        return None
    number, role = wrong + 1, roles[wrong]
    if role == "system":
        cure = "Move it to the beginning, or delete it."
        return f"a system turn in place {number}", "the system turn first", cure
    due = "user" if role == "assistant" else "assistant"
    fault = f"two {role} turns in a row (turns {wrong} and {number})"
    cure = "Join the two turns, or add the one between them."
    if wrong == 0 or roles[wrong - 1] == "system":
        fault = f"the {role}'s turn first"
        cure = "Put the user's turn before it, or delete it."
    return fault, f"user and assistant in turn, so {due} in turn {number}", cure


_SCHEMAS = (
    _Schema(("prompt", "completion"), _from_pair),
    _Schema(("messages",), partial(_from_chat, column="messages")),
    _Schema(("conversations",), partial(_from_chat, column="conversations")),
    _Schema(("instruction", "output"), _from_alpaca),
    _Schema(("text", "label"), _from_classification),
)


# --- from records to columns ---


def _as_dataset(records: list[Record]) -> datasets.Dataset:
    """Columns from records; a field that a record lacks becomes None."""
    import datasets
    import pyarrow

    table = dict.fromkeys(name for record in records for name in record.fields)
    for name in table:
        values = [record.fields.get(name) for record in records]
        table[name] = _as_array(values)
        if table[name] is None:
            raise _mixed_column(name, values, records)
    return datasets.Dataset(pyarrow.table(table))


def _as_array(values: list[Any]) -> Any:
    """The values as a `pyarrow.Array`, or None where they are of several kinds."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeError):
        return None


def _mixed_column(name: str, values: list[Any], records: list[Record]) -> DataError:
    """The first record whose value does not go with those before it."""
    counts = range(1, len(values) + 1)
    i = bisect_left(counts, True, key=lambda n: _as_array(values[:n]) is None)
    fault = f"{describe(values[i])}, unlike the values before it"
    cure = "Write all its values the same way, for example all as texts."
    return records[i].error(name, fault, "values of one kind in a column", cure)
