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

from course_utils.data_errors import DataError, Record, describe, mixed_column
from course_utils.data_files import SUFFIXES, files_of_set, read_records
from course_utils.data_schemas import normalise
from course_utils.runtime import data_folder

if TYPE_CHECKING:
    import datasets

__all__ = ["DataError", "data_hash", "list_bundled", "load_examples"]

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
