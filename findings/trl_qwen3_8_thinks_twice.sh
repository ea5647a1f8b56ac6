#!/usr/bin/env bash
# trl 1.16.0 (transformers 5.23.0, CPU): with trl's Qwen3.8 templates, for chats and for training, an answer that holds
# its thought as "<think> ... </think>" gets an empty thought of its own in front of it.
#
# Many data sets of thoughts have them in the content. The templates of Qwen3 to Qwen3.6 take such a thought for the
# answer's; this one knows the field "reasoning_content" only, and writes a thought for every answer. Trained on that,
# a model learns to close its thought empty and to think in the answer. No error and no warning.
# trl's list of the differences from Qwen3.6 leaves this one out. Cure: move the thought to "reasoning_content".
#
# Seen: Qwen3.6: "<think>\ntwo and two\n</think>\n\n4"; Qwen3.8: "<think>\n\n</think>\n\n<think>\ntwo and two\n</think>
# \n\n4"; with "reasoning_content": one thought in both.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  trl==1.16.0 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$place"
"$place/env/bin/python" - <<'PY'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import (
    get_training_chat_template, qwen3_6_chat_template, qwen3_8_chat_template,
)

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
question = {"role": "user", "content": "2 + 2?"}
thought = "two and two"
in_content = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n4"}
in_its_field = {"role": "assistant", "reasoning_content": thought, "content": "4"}


def turn(template, answer):
    text = tokenizer.apply_chat_template([question, answer], chat_template=template, tokenize=False)
    return text.split("<|im_start|>assistant\n")[1]


right = f"<think>\n{thought}\n</think>\n\n4<|im_end|>\n"
twice = "<think>\n\n</think>\n\n" + right
for name, template in ("3.6", qwen3_6_chat_template), ("3.8", qwen3_8_chat_template):
    tokenizer.chat_template = template
    for made_for, which in ("chats", template), ("training", get_training_chat_template(tokenizer)):
        print("Qwen" + name, "for", made_for, repr(turn(which, in_content)))
        assert turn(which, in_its_field) == right
        assert turn(which, in_content) == (twice if name == "3.8" else right)
PY
echo "as described"
