#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json") turns text into numbers, lists, dicts and None, in a whole column, as soon
# as one value of that column is no text (one number, one list or one dict, in any line; null does no harm).
#
# Such a column gets the new type `Json`. Text is stored in it as it stands, not encoded, and decoded as JSON when it
# is read: "007" is 7, "null" is None, '{"device": "lamp"}' is a dict; "yes" is no JSON and stays. No warning.
# A file of answers with zero-padded codes or JSON as text is learned wrong for the sake of one odd record.
#
# Seen: with ["007", "null", "[1, 2]", '{"device": "lamp"}', "yes"] alone: string, unchanged;
# with a 5 added as a last record: Json, [7, None, [1, 2], {'device': 'lamp'}, 'yes', 5].
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$place"
"$place/env/bin/python" - <<'PY'
import json

import datasets

datasets.disable_progress_bars()
texts = ["007", "null", "[1, 2]", '{"device": "lamp"}', "yes"]


def load(values, name):
    with open(name, "w") as file:
        for value in values:
            file.write(json.dumps({"prompt": "p", "completion": value}) + "\n")
    data = datasets.load_dataset("json", data_files=name, split="train", cache_dir="cache")
    column = list(data["completion"])
    print(name, data.features["completion"], column)
    return column


decoded = [7, None, [1, 2], {"device": "lamp"}, "yes"]
assert load(texts, "texts.jsonl") == texts
assert load([*texts, None], "and_null.jsonl") == [*texts, None]
assert load([*texts, 5], "and_number.jsonl") == [*decoded, 5]
assert load([["x"], *texts], "and_list.jsonl") == [["x"], *decoded]
PY
echo "as described"
