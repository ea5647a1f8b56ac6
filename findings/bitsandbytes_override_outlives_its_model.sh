#!/usr/bin/env bash
# bitsandbytes 0.50.2 with transformers 5.23.0 (torch 2.13.0, CPU): `optim="adamw_bnb_8bit"` leaves two traces
# in a manager that the whole process shares, after the trainer and the model are gone.
#
# Trainer asks that embeddings keep 32-bit states: `GlobalOptimManager.register_module_override(module, "weight", ...)`.
# 1. The manager holds the module itself, for ever: a deleted model's embedding stays in memory.
# 2. The override is kept by the weight's place in its list, (group, index), not by the weight: whatever a later
#    8-bit optimizer has at that place keeps 32-bit states too, 8 bytes a parameter instead of 2, without a word.
#
# Seen: "embedding alive after del and gc: True", "states of a plain weight: before float/uint8 = uint8, after = float32".
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 datasets==5.2.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import gc
import weakref

import bitsandbytes as bnb
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def state_dtype():
    """The dtype in which a fresh 8-bit AdamW keeps the state of one plain weight."""
    weight = torch.nn.Parameter(torch.ones(8192))
    optimizer = bnb.optim.AdamW8bit([weight])
    weight.grad = torch.ones(8192)
    optimizer.step()
    return optimizer.state[weight]["state1"].dtype


def train():
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=1, num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    arguments = TrainingArguments(
        "out", max_steps=1, optim="adamw_bnb_8bit", report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    return weakref.ref(model), weakref.ref(model.get_input_embeddings())


before = state_dtype()
model, embedding = train()
gc.collect()
after = state_dtype()
print("model alive after del and gc:", model() is not None)
print("embedding alive after del and gc:", embedding() is not None)
print("states of a plain weight: before", before, "after", after)
assert model() is None and embedding() is not None
assert (before, after) == (torch.uint8, torch.float32)
bnb.optim.GlobalOptimManager.get_instance().initialize()
gc.collect()
assert embedding() is None and state_dtype() == torch.uint8
print("after GlobalOptimManager.get_instance().initialize(): both gone")
PY
echo "as described"
