#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0, CPU): train(resume_from_checkpoint=...) of a whole Mixtral,
# Qwen3-MoE or Granite-MoE goes on with untrained experts. It only warns of missing keys.
#
# save_pretrained writes the experts under the names of the published checkpoints, from_pretrained translates them
# back, and Trainer's own loading does not: it takes the names as they are and passes over those it does not find.
# What it passes over stays as in the model that was handed in, while the optimizer's state is that of the trained.
# Cure: hand in a model read with from_pretrained(checkpoint).
#
# Seen: Llama: all as saved; Mixtral and Granite-MoE: experts and router as fresh; Qwen3-MoE: experts as fresh;
# two log lines, "missing keys" and "unexpected keys".
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
    AutoModelForCausalLM, GraniteMoeConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig,
    Trainer, TrainerCallback, TrainingArguments,
)

rows = [{"input_ids": [1, 2, 3, i % 7 + 4], "labels": [1, 2, 3, i % 7 + 4]} for i in range(16)]


class KeepLog(logging.Handler):
    text = ""

    def emit(self, record):
        KeepLog.text += f"{record.levelname}: {record.getMessage()[:100]}...\n"


transformers.utils.logging.get_logger("transformers").addHandler(KeepLog())


class KeepStart(TrainerCallback):
    """The weights that the first step of this run starts from."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}


def fresh(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def train(config, steps, resume=None):
    arguments = TrainingArguments(
        "out", report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-2, max_steps=steps, save_steps=2,
    )
    start = KeepStart()
    trainer = Trainer(fresh(config), arguments, train_dataset=rows, callbacks=[start])
    trainer.train(resume_from_checkpoint=resume)
    return start.weights


sizes = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4,
)
kinds = {
    "Llama": (LlamaConfig(**sizes), set()),
    "Mixtral": (MixtralConfig(num_local_experts=4, **sizes), {"experts", "gate"}),
    "Qwen3-MoE": (
        Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **sizes
        ),
        {"experts"},
    ),
    "Granite-MoE": (
        GraniteMoeConfig(num_local_experts=4, num_experts_per_tok=2, **sizes),
        {"experts", "router"},
    ),
}
for kind, (config, expected) in kinds.items():
    untrained = train(config, 2)
    saved = AutoModelForCausalLM.from_pretrained("out/checkpoint-2").state_dict()
    assert all(not torch.equal(untrained[name], saved[name]) for name in saved)
    KeepLog.text = ""
    resumed = train(config, 4, "out/checkpoint-2")
    lost = sorted(name for name in saved if not torch.equal(resumed[name], saved[name]))
    print(kind, "resumes without", lost, "and says:", KeepLog.text or "nothing", sep="\n")
    assert all(torch.equal(resumed[name], untrained[name]) for name in lost)
    assert {name.removesuffix(".weight").split(".")[4] for name in lost} == expected
    assert ("WARNING: There were missing keys" in KeepLog.text) == bool(lost)
PY
echo "as described"
