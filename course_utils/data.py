"""Load a data set: a bundled one, the reader's own file or folder, or one from a hub.

Whatever its columns are called, a set leaves here as a `datasets.Dataset` with
`prompt` and `completion`, or with `messages`; a record that cannot be used raises
`DataError`, which says where it stands and what to do. Nothing is dropped silently.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils.data_files import (
    SUFFIXES,
    DataError,
    Record,
    describe,
    files_of_set,
    mixed_column,
    read_records,
)
from course_utils.runtime import data_folder

if TYPE_CHECKING:
    import datasets

__all__ = ["DataError", "data_hash", "list_bundled", "load_examples"]

# --- data_schemas ---
# Recognise the columns of a data set, check every record, rename to the course's.
#
# The set's first record decides the schema, and all others must follow it.

# What each schema needs, in the order in which they are tried.
SCHEMAS: dict[str, tuple[str, ...]] = {
    "prompt and completion": ("prompt", "completion"),
    "chat": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "classification": ("text", "label"),
}
EXPECTED = (
    "prompt + completion, messages, conversations, instruction + output "
    "(+ input), or text + label"
)
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ROLE_HINTS = {
    "human": "user",
    "question": "user",
    "bot": "assistant",
    "gpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "developer": "system",
}


def normalise(records: list[Record]) -> list[Record]:
    """The same records with `prompt` and `completion`, or with `messages`.

    Raises:
        DataError: A record does not follow the schema, or a field cannot be used.
    """
    if not records:
        raise DataError("no record", expected="at least one", cure="Add records.")
    schema = _recognise(records[0])
    convert = _CONVERTERS[schema]
    if schema == "classification":
        records = _number_labels(records)
    normalised = []
    for record in records:
        _check_fields(record, schema, records[0])
        normalised.append(record._replace(fields=convert(record)))
    return normalised


def _matches(fields: dict[str, Any], schema: str) -> bool:
    return all(fields.get(name) is not None for name in SCHEMAS[schema])


def _recognise(record: Record) -> str:
    for schema in SCHEMAS:
        if _matches(record.fields, schema):
            return schema
    for schema, needed in SCHEMAS.items():  # half there: say what is missing
        if any(name in record.fields for name in needed):
            return schema
    names = list(record.fields)
    wanted = {name for needed in SCHEMAS.values() for name in needed}
    hints = []
    for name in names:
        near = difflib.get_close_matches(name.strip().lower(), wanted, n=1, cutoff=0.8)
        hints += [f"{name!r} to {near[0]!r}"] if near else []
    raise record.error(
        None,
        "the fields " + ", ".join(map(repr, names)) if names else "no fields",
        EXPECTED,
        f"Rename {', '.join(hints)}."
        if hints
        else "Rename the fields to one of these.",
    )


def _check_fields(record: Record, schema: str, first: Record) -> None:
    for name in SCHEMAS[schema]:
        if name in record.fields:
            continue
        other = next((s for s in SCHEMAS if _matches(record.fields, s)), None)
        if other and record is not first:
            raise record.error(
                None,
                f"a record of the kind {other} ({' + '.join(SCHEMAS[other])})",
                f"the kind {schema} ({' + '.join(SCHEMAS[schema])}), "
                f"as in {first.unit} {first.line}",
                "Put each kind of record into a file of its own.",
            )
        names = list(record.fields)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        raise record.error(
            name,
            f"no field {name!r}, only {', '.join(map(repr, names)) or 'no fields'}",
            f"a field {name!r}",
            f"Rename {near[0]!r} to {name!r}." if near else f"Add {name!r}.",
        )


def _check_text(record: Record, column: str, value: Any, *, blank: bool = False):
    """`value` if it is a usable text, or else an error about `column`."""
    if not isinstance(value, str):
        raise record.error(
            column,
            describe(value),
            "a text",
            "Put double quotes around it."
            if isinstance(value, int | float)
            else "Write a text, or delete the record.",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise record.error(
            column,
            f"half of a surrogate pair (\\u{ord(value[error.start]):04x})",
            "a text of whole characters",
            "Write the character itself, or both halves of its escape.",
        ) from None
    if not blank and not value.strip():
        raise record.error(
            column,
            describe(value),
            "a text with something to learn"
            if column in ("completion", "output")
            else "a text with something in it",
            "Write one, or delete the record.",
        )
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
    context = _check_text(record, "input", fields["input"], blank=True)
    completion = _check_text(record, "output", fields["output"])
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {**fields, "prompt": prompt, "completion": completion}


def _from_classification(record: Record) -> dict[str, Any]:
    text = _check_text(record, "text", record.fields["text"])
    label = record.fields["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise record.error(
            "label",
            describe(label),
            "a whole number from 0, or a name",
            "Write the class as its number or its name.",
        )
    if isinstance(label, int) and label < 0:
        raise record.error(
            "label",
            describe(label),
            "a whole number from 0, or a name",
            "A negative label means that this split has no labels: use another.",
        )
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
        record._replace(fields={**record.fields, "label": int(record.fields["label"])})
        for record in records
    ]


def _from_messages(record: Record) -> dict[str, Any]:
    messages = record.fields["messages"]
    _check_turns(record, "messages", messages, "role", "content")
    return record.fields


def _from_conversations(record: Record) -> dict[str, Any]:
    turns = record.fields["conversations"]
    _check_turns(record, "conversations", turns, "from", "value")
    messages = [
        {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        for turn in turns
    ]
    return {**record.fields, "messages": messages}


def _check_turns(
    record: Record, column: str, turns: Any, role_key: str, text_key: str
) -> None:
    """Roles known, system first if at all, then user and assistant in turn."""

    def fail(found: str, expected: str, cure: str) -> DataError:
        return record.error(column, found, expected, cure)

    known = {role: role for role in ROLES} if role_key == "role" else _SHAREGPT_ROLES
    if not isinstance(turns, list):
        cure = (
            "A CSV cell cannot hold a list: use .jsonl."
            if record.file.lower().endswith(".csv")
            else f'Write [{{"{role_key}": "...", "{text_key}": "..."}}, ...].'
        )
        raise fail(describe(turns), "a list of turns", cure)
    if not turns:
        raise fail("a list without a turn", "at least two turns", "Delete the record.")
    roles = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            keys = ", ".join(map(repr, turn)) if isinstance(turn, dict) else ""
            raise fail(
                f"turn {number}, {describe(turn)}" + (f" with {keys}" if keys else ""),
                f"an object with {role_key!r} and {text_key!r}",
                "Rename or add the fields.",
            )
        name = turn[role_key]
        role = known.get(name) if isinstance(name, str) else None
        if role is None:
            hint = _ROLE_HINTS.get(str(name).strip().lower(), str(name).lower().strip())
            cure = (
                f"Write {hint!r} instead."
                if hint in known and role_key == "role"
                else "Rename the role, or delete the turn."
            )
            raise fail(
                f"the role {name!r} in turn {number}",
                f"one of {', '.join(known)}",
                cure,
            )
        _check_text(record, f"{column}[{number}].{text_key}", turn[text_key])
        if role == "system" and number > 1:
            raise fail(
                f"a system turn in place {number}",
                "the system turn first",
                "Move it to the beginning, or delete it.",
            )
        wanted = "user" if not roles or roles[-1] == "assistant" else "assistant"
        if role not in ("system", wanted):
            raise fail(
                f"two {role} turns in a row (turns {number - 1} and {number})"
                if roles
                else f"the {role}'s turn first",
                f"user and assistant in turn, so {wanted} in turn {number}",
                "Join the two turns, or add the one between them."
                if roles
                else "Put the user's turn before it, or delete it.",
            )
        roles += [role] if role != "system" else []
    if "assistant" not in roles:
        raise fail(
            "no assistant turn", "at least one, to learn from", "Add the answer."
        )
    if roles[-1] != "assistant":
        raise fail(
            f"the user's turn last (turn {len(turns)})",
            "an assistant turn last",
            "Add the answer, or delete that turn.",
        )


_CONVERTERS = {
    "prompt and completion": _from_pair,
    "chat": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
    "classification": _from_classification,
}


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
        source: A bundled set's name (see `list_bundled`); a .jsonl, .json, .csv or
            .parquet file; a folder with train.jsonl, validation.jsonl, test.jsonl
            (not necessarily all three); or a hub id, "org/name" or
            "org/name:configuration".
        split: "train", "validation", "test", or "all" of them. One own file is
            split 80/10/10 by a hash of the prompt, so that equal prompts stay
            together and a record never moves when others are added.
        limit: Take at most this many records; fewer where there are fewer.
        seed: Orders what `limit` takes. Without `limit` the file's order is kept.

    Returns:
        A `datasets.Dataset`, held in memory.

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
        records = normalise(_read_hub(str(source), split, limit, seed))
        return _as_dataset(records)
    if place.is_dir():
        records = normalise(_read_folder(place, str(source), split))
    else:
        records = _part_of_file(place, normalise(read_records(place)), split)
    if limit is not None:
        records = [records[i] for i in _order(len(records), seed)[:limit]]
    return _as_dataset(records)


def list_bundled() -> list[str]:
    """The names of the data sets that come with the course.

    >>> "general_questions" in list_bundled()
    True
    """
    root = data_folder()
    folders = {path.parent for path in root.rglob("*.jsonl") if path.stem in SPLITS}
    return sorted(folder.relative_to(root).as_posix() for folder in folders)


def data_hash(source: str | Path) -> str:
    """SHA-256 (64 hex digits) of `source`: a bundled set, an own folder or own file.

    A folder's hash covers the names and the bytes of its split files.

    Raises:
        DataError: There is no such set or file, or it is on a hub.
    """
    place = _locate(source)
    if place is None:
        raise DataError(
            "a hub id",
            expected="a bundled set, a folder or a file",
            cure="Record the revision of a hub data set instead.",
            file=source,
        )
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    for name, path in sorted(_split_files(place, str(source)).items()):
        whole.update(
            f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return whole.hexdigest()


def _locate(source: str | Path) -> Path | None:
    """The file or folder that `source` names; None for a hub id."""
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a text or a Path, not {describe(source)}")
    name, bundled = str(source), list_bundled()
    if isinstance(source, str) and name.strip("/") in bundled:
        return data_folder() / name.strip("/")
    path = Path(name).expanduser()
    if path.exists():
        return path
    looks_like_file = path.suffix.lower() in (*SUFFIXES, ".txt", ".tsv", ".xlsx", ".gz")
    a_path = isinstance(source, Path) or name.startswith((".", "/", "~"))
    if a_path or looks_like_file or "\\" in name or name.count("/") > 1:
        raise _no_such_file(path)
    if _HUB_ID.fullmatch(name):
        return None
    raise DataError(
        f"no bundled set named {name!r}",
        expected="one of " + ", ".join(bundled),
        cure=_nearest(name, bundled)
        or "A file needs its ending (my.jsonl), a hub id its owner (org/name).",
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def _no_such_file(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        cure = f"There is no folder {folder} either: check the path."
        return DataError(
            "no such file", expected="an existing file", cure=cure, file=path
        )
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    cure = _nearest(path.name, names)
    if not cure and files:
        cure = f"The data files in {folder.resolve()}: {', '.join(files[:5])}."
    return DataError(
        "no such file",
        expected="an existing file",
        cure=cure or f"{folder.resolve()} holds no data file: check the path.",
        file=path,
    )


def _split_files(folder: Path, name: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in files_of_set(folder):
        if path.stem in SPLITS and path.suffix.lower() in SUFFIXES:
            if path.stem in files:
                raise DataError(
                    f"{files[path.stem].name} and {path.name}",
                    expected="one file for each split",
                    cure="Delete or move one of them.",
                    file=name,
                )
            files[path.stem] = path
    if not files:
        raise DataError(
            "a folder without train, validation or test files",
            expected="train.jsonl, validation.jsonl or test.jsonl",
            cure="Name one of its files instead, or rename them so.",
            file=name,
        )
    return files


def _unknown_split(name: str, split: str, splits: Iterable[str]) -> DataError:
    splits = [repr(known) for known in splits]
    return DataError(
        f"no split {split!r}",
        expected="one of " + ", ".join([*splits, "'all'"]),
        cure=f"Write load_examples({name!r}, {splits[0]}).",
        file=name,
    )


def _read_folder(folder: Path, name: str, split: str) -> list[Record]:
    files = _split_files(folder, name)
    known = [known for known in SPLITS if known in files]
    if split not in (*known, "all"):
        raise _unknown_split(name, split, known)
    chosen = known if split == "all" else [split]
    return [record for part in chosen for record in read_records(files[part])]


def _part_of_file(path: Path, records: list[Record], split: str) -> list[Record]:
    if split not in (*SPLITS, "all"):
        raise _unknown_split(str(path), split, SPLITS)
    if split == "all":
        return records
    part = [record for record in records if _hash_split(record.fields) == split]
    if not part:
        raise DataError(
            f"none of its {len(records)} records in the split {split!r}",
            expected="at least one (a file splits 80/10/10 by a hash of the prompt)",
            cure="Add records, ask for 'all', or make a folder with train.jsonl "
            "and validation.jsonl.",
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
            expected="a hub id org/name or org/name:configuration, and its split",
            cure="Check the network, the id and the split; bundled sets, which need "
            f"no network: {', '.join(list_bundled())}.",
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
            raise mixed_column(name, values, records) from None
    return datasets.Dataset(pyarrow.table(table))
