#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1: load_dataset("json") makes a column of texts a column of datetime objects when
# every text in it happens to look like an ISO date, also inside chat messages. One other text keeps all of them texts.
#
# JSON has no dates, so one expects strings. Instead: timestamp[s], the text that was written is gone ("2024-01-02"
# reads back as "2024-01-02 00:00:00", and the offset of "2024-01-02T10:00:00+02:00" is lost: it becomes 08:00).
# A small file or a small split of answers is hit where the great one is not, and the two no longer fit together.
# Telling `features=` with Value("string") does not help: the dates are made first and written out again.
# Cure: Dataset.from_list of the lines read with json.loads.
#
# Seen: completion timestamp[s], str() of the first "2024-01-02 00:00:00"; content of messages timestamp[s];
# with "no date" as a third answer: string; with features told: "2024-01-02 00:00:00", "2024-01-02 08:00:00".
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$place"
"$place/env/bin/python" - <<'PY'
import datetime
import json

import datasets
from datasets import Features, Value

datasets.disable_progress_bars()


def load(records, name, features=None):
    with open(name, "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    data = datasets.load_dataset(
        "json", data_files=name, split="train", cache_dir="cache", features=features
    )
    print(name, data.features, data[0])
    return data


answers = [
    {"prompt": "When is it due?", "completion": "2024-01-02"},
    {"prompt": "When was it sent?", "completion": "2024-01-02T10:00:00+02:00"},
]
data = load(answers, "dates.jsonl")
assert data.features["completion"] == Value("timestamp[s]")
assert data[0]["completion"] == datetime.datetime(2024, 1, 2)
assert str(data[0]["completion"]) == "2024-01-02 00:00:00"
assert data[1]["completion"] == datetime.datetime(2024, 1, 2, 8)

chat = [{"messages": [{"role": "assistant", "content": "2024-01-02"}]}]
content = load(chat, "chat.jsonl")[0]["messages"][0]["content"]
assert content == datetime.datetime(2024, 1, 2)

other = {"prompt": "When?", "completion": "no date"}
column = load([*answers, other], "one_more.jsonl")["completion"]
assert list(column) == [answers[0]["completion"], answers[1]["completion"], "no date"]

texts = Features({"prompt": Value("string"), "completion": Value("string")})
told = list(load(answers, "told.jsonl", texts)["completion"])
print("with features told:", told)
assert told == ["2024-01-02 00:00:00", "2024-01-02 08:00:00"]

rows = [json.loads(line) for line in open("dates.jsonl")]
column = datasets.Dataset.from_list(rows)["completion"]
assert list(column) == [answer["completion"] for answer in answers]
PY
echo "as described"
