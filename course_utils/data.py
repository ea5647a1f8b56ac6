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
from collections.abc import Callable, Iterable
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

    Recognised columns: prompt + completion; messages (role, content);
    conversations (from, value); instruction + output, with or without input;
    text + label. Instruction and input joined by an empty line become the prompt;
    a label's name, or else its number, becomes the completion. All original
    columns are kept.

    Args:
        source: A bundled set's name; a .jsonl, .json, .csv or .parquet file; a folder
            with train.jsonl, validation.jsonl, test.jsonl (not necessarily all
            three); or a hub id, "org/name" or "org/name:configuration".
        split: "train", "validation", "test", or "all" of them. One own file is
            split 80/10/10 by a hash of the prompt, so that equal prompts stay
            together and a record never moves when others are added.
        limit: Take at most this many records; fewer where there are fewer.
        seed: Orders what `limit` takes. Without `limit` the file's order is kept.

    Raises:
        DataError: The source, the split or a record cannot be used.
        ValueError: `limit` is not a positive whole number.

    >>> examples = load_examples("general_questions", "test", limit=3)
    >>> sorted(examples.column_names)
    ['answer', 'answers', 'completion', 'prompt']
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a positive whole number, not {limit!r}")
    place = _locate(source)
    if place is None:
        return _as_dataset(_normalise(_read_hub(str(source), split, limit, seed)))
    if place.is_dir():
        records = _normalise(_read_folder(place, str(source), split))
    else:
        records = _part_of_file(place, _normalise(read_records(place)), split)
    if limit is not None:
        records = [records[i] for i in _order(len(records), seed)[:limit]]
    return _as_dataset(records)


def data_hash(source: str | Path) -> str:
    """SHA-256 (64 hex digits) of `source`: a bundled set, an own folder or own file.

    A folder's hash covers the names and the bytes of its split files.

    Raises:
        DataError: There is no such set or file, or it is on a hub.
    """
    place = _locate(source)
    if place is None:
        cure = "Record the revision of a hub data set instead."
        expected = "a bundled set, a folder or a file"
        raise DataError("a hub id", expected, cure, file=source)
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
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a text or a Path, not {describe(source)}")
    name, bundled = str(source), _bundled_sets()
    if isinstance(source, str) and name.strip("/") in bundled:
        return data_folder() / name.strip("/")
    path = Path(name).expanduser()
    if path.exists():
        return path
    looks_like_file = path.suffix.lower() in (*READERS, ".txt", ".tsv", ".xlsx", ".gz")
    a_path = isinstance(source, Path) or name.startswith((".", "/", "~"))
    if a_path or looks_like_file or "\\" in name or name.count("/") > 1:
        cure = _cure_for_missing(path)
        raise DataError("no such file", "an existing file", cure, file=path)
    if _HUB_ID.fullmatch(name):
        return None
    cure = "A file needs its ending (my.jsonl), a hub id its owner (org/name)."
    cure = _did_you_mean(name, bundled) or cure
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
    if cure := _did_you_mean(path.name, names):
        return cure
    files = [name for name in names if Path(name).suffix.lower() in READERS]
    if files:
        return f"The data files in {folder.resolve()}: {', '.join(files[:5])}."
    return f"{folder.resolve()} holds no data file: check the path."


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
        if path.stem in files:
            both = f"{files[path.stem].name} and {path.name}"
            cure = "Delete or move one of them."
            raise DataError(both, "one file for each split", cure, file=name)
        files[path.stem] = path
    if not files:
        fault = "a folder without train, validation or test files"
        expected = "train.jsonl, validation.jsonl or test.jsonl"
        cure = "Name one of its files instead, or rename them so."
        raise DataError(fault, expected, cure, file=name)
    return files


def _check_split(name: str, split: str, known: Iterable[str]) -> None:
    if split not in (*known, "all"):
        splits = list(map(repr, known))
        expected = "one of " + ", ".join([*splits, "'all'"])
        cure = f"Write load_examples({name!r}, {splits[0]})."
        raise DataError(f"no split {split!r}", expected, cure, file=name)


def _read_folder(folder: Path, name: str, split: str) -> list[Record]:
    files = _split_files(folder, name)
    known = [known for known in SPLITS if known in files]
    _check_split(name, split, known)
    chosen = known if split == "all" else [split]
    return [record for part in chosen for record in read_records(files[part])]


def _part_of_file(path: Path, records: list[Record], split: str) -> list[Record]:
    _check_split(str(path), split, SPLITS)
    if split == "all":
        return records
    part = [record for record in records if _hash_split(record.fields) == split]
    if not part:
        raise DataError(
            f"none of its {len(records)} records in the split {split!r}",
            "at least one (a file splits 80/10/10 by a hash of the prompt)",
            "Add records, ask for 'all', or make a folder with train.jsonl and "
            "validation.jsonl.",
            file=path,
        )
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
        raise DataError(
            f"no data set that loads ({type(error).__name__}: {reason})",
            "a hub id org/name or org/name:configuration, and its split",
            "Check the network, the id and the split; bundled sets, which need no "
            f"network: {', '.join(_bundled_sets())}.",
            file=name,
        ) from error
    if limit is not None:
        loaded = loaded.select(_order(len(loaded), seed)[:limit])
    rows = loaded.to_list()
    names = getattr(loaded.features.get("label"), "names", None)
    for row in rows if names and "label_text" not in loaded.features else []:
        if row["label"] is not None and 0 <= row["label"] < len(names):
            row["label_text"] = names[row["label"]]
    return [Record(name, line, "row", row) for line, row in enumerate(rows, start=1)]


# --- which columns it has: the first record decides, all others must follow ---


class _Schema(NamedTuple):
    name: str
    needed: tuple[str, ...]
    convert: Callable[[Record], dict[str, Any]]  # checks a record, renames its fields

    def __str__(self) -> str:
        return f"{self.name} ({' + '.join(self.needed)})"

    def fits(self, record: Record) -> bool:
        return all(record.fields.get(name) is not None for name in self.needed)


def _normalise(records: list[Record]) -> list[Record]:
    """The same records with `prompt` and `completion`, or with `messages`."""
    if not records:
        raise DataError("no record", "at least one", "Add records.")
    schema = _recognise(records[0])
    if schema.name == "classification":
        records = _number_labels(records)
    normalised = []
    for record in records:
        for name in schema.needed:
            if name not in record.fields:
                raise _missing_field(record, name, schema, records[0])
        normalised.append(record._replace(fields=schema.convert(record)))
    return normalised


def _recognise(record: Record) -> _Schema:
    for schema in _SCHEMAS:
        if schema.fits(record):
            return schema
    for schema in _SCHEMAS:  # half there: what is missing is said later
        if any(name in record.fields for name in schema.needed):
            return schema
    known = {name for schema in _SCHEMAS for name in schema.needed}
    renames = []
    for name in record.fields:
        near = difflib.get_close_matches(name.strip().lower(), known, n=1, cutoff=0.8)
        renames += [f"{name!r} to {near[0]!r}"] if near else []
    names = ", ".join(map(repr, record.fields))
    raise record.error(
        None,
        f"the fields {names}" if names else "no fields",
        "prompt + completion, messages, conversations, instruction + output "
        "(+ input), or text + label",
        f"Rename {', '.join(renames) or 'the fields to one of these'}.",
    )


def _missing_field(
    record: Record, name: str, schema: _Schema, first: Record
) -> DataError:
    other = next((other for other in _SCHEMAS if other.fits(record)), None)
    if other and record is not first:
        expected = f"the kind {schema}, as in {first.unit} {first.line}"
        cure = "Put each kind of record into a file of its own."
        return record.error(None, f"a record of the kind {other}", expected, cure)
    near = difflib.get_close_matches(name, list(record.fields), n=1, cutoff=0.6)
    cure = f"Rename {near[0]!r} to {name!r}." if near else f"Add {name!r}."
    names = ", ".join(map(repr, record.fields)) or "no fields"
    fault = f"no field {name!r}, only {names}"
    return record.error(name, fault, f"a field {name!r}", cure)


def _check_text(
    record: Record, column: str, value: Any, *, may_be_blank: bool = False
) -> str:
    """`value` if it is a usable text, or else an error about `column`."""
    if not isinstance(value, str):
        cure = "Write a text, or delete the record."
        if isinstance(value, int | float):
            cure = "Put double quotes around it."
        raise record.error(column, describe(value), "a text", cure)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fault = f"half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        cure = "Write the character itself, or both halves of its escape."
        expected = "a text of whole characters"
        raise record.error(column, fault, expected, cure) from None
    if not value.strip() and not may_be_blank:
        answers = column in ("completion", "output")
        expected = "a text with something " + ("to learn" if answers else "in it")
        cure = "Write one, or delete the record."
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
    instruction = _check_text(record, "instruction", fields["instruction"])
    context = _check_text(record, "input", fields["input"], may_be_blank=True)
    completion = _check_text(record, "output", fields["output"])
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {**fields, "prompt": prompt, "completion": completion}


def _from_classification(record: Record) -> dict[str, Any]:
    text = _check_text(record, "text", record.fields["text"])
    label = record.fields["label"]
    of_a_kind = isinstance(label, int | str) and not isinstance(label, bool)
    if not of_a_kind or (isinstance(label, int) and label < 0):
        cure = "Write the class as its number or its name."
        if of_a_kind:
            cure = "A negative label means that this split has no labels: use another."
        expected = "a whole number from 0, or a name"
        raise record.error("label", describe(label), expected, cure)
    name = record.fields.get("label_text")
    completion = _check_text(record, "label", str(label) if name is None else name)
    return {**record.fields, "prompt": text, "completion": completion}


def _number_labels(records: list[Record]) -> list[Record]:
    """A CSV file holds only texts: labels that are all numbers become numbers.

    Codes with leading zeros stay texts: "0111" and "111" are two classes.
    """
    labels = [record.fields.get("label") for record in records]
    digits = all(
        isinstance(label, str) and label.isdecimal() and str(int(label)) == label
        for label in labels
    )
    if not digits or not records[0].file.lower().endswith(".csv"):
        return records
    return [
        record._replace(fields={**record.fields, "label": int(label)})
        for record, label in zip(records, labels, strict=True)
    ]


_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ROLE_HINTS = {
    **_ROLES,  # in other letters, or with blanks around it
    **dict.fromkeys(("human", "question"), "user"),
    **dict.fromkeys(("bot", "gpt", "ai", "model"), "assistant"),
    "developer": "system",
}


def _from_messages(record: Record) -> dict[str, Any]:
    _read_turns(record, "messages", ("role", "content"), _ROLES)
    return record.fields


def _from_conversations(record: Record) -> dict[str, Any]:
    keys = "from", "value"
    messages = _read_turns(record, "conversations", keys, _SHAREGPT_ROLES)
    return {**record.fields, "messages": messages}


def _read_turns(
    record: Record, column: str, keys: tuple[str, str], roles: dict[str, str]
) -> list[dict[str, str]]:
    """The checked turns of a chat as role and content; `roles` translates its roles."""
    turns = record.fields[column]
    role_key, text_key = keys
    if not isinstance(turns, list):
        cure = f'Write [{{"{role_key}": "...", "{text_key}": "..."}}, ...].'
        if record.file.lower().endswith(".csv"):
            cure = "A CSV cell cannot hold a list: use .jsonl."
        raise record.error(column, describe(turns), "a list of turns", cure)
    if not turns:
        fault, expected = "a list without a turn", "at least two turns"
        raise record.error(column, fault, expected, "Delete the record.")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not set(keys) <= turn.keys():
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
    _check_order(record, column, [message["role"] for message in messages])
    return messages


def _check_order(record: Record, column: str, roles: list[str]) -> None:
    wrong = first_misplaced_turn(roles)
    if wrong is not None:
        number, role = wrong + 1, roles[wrong]
        due = "user" if role == "assistant" else "assistant"
        expected = f"user and assistant in turn, so {due} in turn {number}"
        if role == "system":
            fault = f"a system turn in place {number}"
            expected = "the system turn first"
            cure = "Move it to the beginning, or delete it."
        elif wrong == 0 or roles[wrong - 1] == "system":
            fault = f"the {role}'s turn first"
            cure = "Put the user's turn before it, or delete it."
        else:
            fault = f"two {role} turns in a row (turns {wrong} and {number})"
            cure = "Join the two turns, or add the one between them."
    elif "assistant" not in roles:
        fault, expected = "no assistant turn", "at least one, to learn from"
        cure = "Add the answer."
    elif roles[-1] == "user":
        fault = f"the user's turn last (turn {len(roles)})"
        expected = "an assistant turn last"
        cure = "Add the answer, or delete that turn."
    else:
        return
    raise record.error(column, fault, expected, cure)


_SCHEMAS = (
    _Schema("prompt and completion", ("prompt", "completion"), _from_pair),
    _Schema("chat", ("messages",), _from_messages),
    _Schema("conversations", ("conversations",), _from_conversations),
    _Schema("alpaca", ("instruction", "output"), _from_alpaca),
    _Schema("classification", ("text", "label"), _from_classification),
)


# --- from records to columns ---


def _as_dataset(records: list[Record]) -> datasets.Dataset:
    """Columns from records; a field that a record lacks becomes None."""
    import datasets
    import pyarrow

    names = list(dict.fromkeys(name for record in records for name in record.fields))
    table = {}
    for name in names:
        values = [record.fields.get(name) for record in records]
        try:
            table[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            raise _mixed_column(name, values, records) from None
    return datasets.Dataset(pyarrow.table(table))


def _mixed_column(name: str, values: list[Any], records: list[Record]) -> DataError:
    """The first record whose value does not go with those before it."""
    import pyarrow

    first, end = 1, len(values)  # the least number of values that fail together
    while first < end:
        middle = (first + end) // 2
        try:
            pyarrow.array(values[:middle])
            first = middle + 1
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            end = middle
    fault = f"{describe(values[end - 1])}, unlike the values before it"
    cure = "Write all its values the same way, for example all as texts."
    return records[end - 1].error(name, fault, "values of one kind in a column", cure)
