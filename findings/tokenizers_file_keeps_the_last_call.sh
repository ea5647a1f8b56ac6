#!/usr/bin/env bash
# tokenizers 0.23.3 with transformers 5.23.0: the padding and the truncation of the last call stay in the tokenizer,
# and save_pretrained writes them into tokenizer.json. Whoever reads that file with the tokenizers library pads and
# cuts every text, unasked.
#
# transformers itself hides it: it sets both anew at each call, so the round trip looks right in Python. A server or
# another tool that reads tokenizer.json by itself gets texts cut to the length that a script had last used before
# saving, without an error. Cure: one plain call, tokenizer("x"), just before save_pretrained.
#
# Seen, a text of 12 tokens: 12 from transformers after loading; from tokenizers.Tokenizer.from_file: 4 (cut), and
# one of 1 token: 4 (padded). After a plain call before saving: 12 and 1.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3
cd "$place"
"$place/env/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
texts = [" ".join("a" * 12), "a"]


def lengths(folder):
    file = Tokenizer.from_file(folder + "/tokenizer.json")
    again = PreTrainedTokenizerFast.from_pretrained(folder)
    print(folder, "truncation", file.truncation, "padding", file.padding)
    return (
        [len(file.encode(text).ids) for text in texts],
        [len(again(text)["input_ids"]) for text in texts],
    )


tokenizer("a", truncation=True, padding="max_length", max_length=4)
tokenizer.save_pretrained("after_a_padded_call")
tokenizer("a")
tokenizer.save_pretrained("after_a_plain_call")
for folder in ("after_a_padded_call", "after_a_plain_call"):
    read = lengths(folder)
    print("tokens read by tokenizers, by transformers:", *read)
    assert read == ([4, 4] if "padded" in folder else [12, 1], [12, 1])
PY
echo "as described"
