#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0, CPU): train(resume_from_checkpoint=...) with another
# learning_rate, weight_decay or adam_beta2 goes on with the old ones. It warns of a changed save_steps, not of these.
#
# The optimizer's saved state brings its settings along and overwrites the new arguments; a schedule starts from the
# old rate as well ("initial_lr"), though over the new number of steps. trainer.args shows the new values all the time.
# To go on at another rate: load the weights only, without resume_from_checkpoint.
#
# Seen: checkpoint trained at 1e-3, weight decay 0; resumed with 1e-5, 0.5, beta2 0.5: steps at 0.001, 0.0, 0.999;
# linear schedule over 8 steps resumed at step 2 with 1e-5: steps at 1e-3, 6.25e-4, 5e-4 ... The log names save_steps
# alone.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import logging

import torch
import transformers
from transformers import (
    LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments,
)

rows = [{"input_ids": [1, 2, 3, i % 7 + 4], "labels": [1, 2, 3, i % 7 + 4]} for i in range(16)]


class KeepSettings(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        group = optimizer.param_groups[0]
        self.steps.append((group["lr"], group["weight_decay"], group["betas"][1]))


class KeepLog(logging.Handler):
    text = ""

    def emit(self, record):
        KeepLog.text += record.getMessage()


transformers.utils.logging.get_logger("transformers").addHandler(KeepLog())


def train(resume=None, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=1, num_attention_heads=4,
    )
    arguments = TrainingArguments(
        "out", report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, **settings,
    )
    kept = KeepSettings()
    trainer = Trainer(
        LlamaForCausalLM(config), arguments, train_dataset=rows, callbacks=[kept]
    )
    trainer.train(resume_from_checkpoint=resume)
    return kept.steps


train(max_steps=2, learning_rate=1e-3, lr_scheduler_type="constant", save_steps=2)
checkpoint = "out/checkpoint-2"
new = dict(learning_rate=1e-5, weight_decay=0.5, adam_beta2=0.5, save_strategy="no")
assert train(max_steps=2, lr_scheduler_type="constant", **new)[0] == (1e-5, 0.5, 0.5)
KeepLog.text = ""
resumed = train(checkpoint, max_steps=4, lr_scheduler_type="constant", **new)
print("resumed with", new, "steps at (rate, decay, beta2)", resumed)
print("log:", KeepLog.text)
linear = train(checkpoint, max_steps=8, lr_scheduler_type="linear", **new)
print("resumed with a linear schedule", linear)
assert resumed == [(1e-3, 0.0, 0.999)] * 2
assert "save_steps" in KeepLog.text
assert "learning_rate" not in KeepLog.text and "weight_decay" not in KeepLog.text
assert abs(linear[1][0] - 1e-3 * 5 / 8) < 1e-12 and linear[1][1:] == (0.0, 0.999)
PY
echo "as described"
