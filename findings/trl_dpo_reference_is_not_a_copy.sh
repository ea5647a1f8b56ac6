#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0 (torch 2.13.0, CPU): DPOTrainer(model, ref_model=None) with a whole model takes
# as the reference what lies at model.config._name_or_path, not a copy of the model that it was given.
#
# The paper's reference is the model before DPO; "None" sounds like a copy of it. A model that was loaded, tuned in
# memory (or merged with its adapter) and handed over is compared with its own base instead: DPO starts with rewards
# that it did not earn and is held near the base, not near the tuned model. No warning.
# Cure: ref_model=copy.deepcopy(model), or save the tuned model and load it from there.
#
# Seen, first loss (ln 2 = 0.6931 where model and reference are one): model as loaded 0.6931; changed in memory after
# loading 0.3023; the same with ref_model=copy.deepcopy(model) 0.6931.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import copy
import math

import datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

datasets.disable_progress_bars()
words = "<pad> <eos> <unk> how are you fine thanks bad no".split()
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
pair = {"prompt": "how are you", "chosen": " fine thanks", "rejected": " bad no"}
pairs = Dataset.from_list([pair] * 4)
torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )
).save_pretrained("base")


def tuned():
    """The base, trained in memory to give the chosen answer."""
    model = LlamaForCausalLM.from_pretrained("base")
    tokens = torch.tensor([[3, 4, 5, 6, 7, 1]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


def first_loss(model, ref_model=None):
    arguments = DPOConfig(
        "out", max_steps=1, logging_steps=1, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model, ref_model, args=arguments, train_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


loaded = first_loss(LlamaForCausalLM.from_pretrained("base"))
in_memory = first_loss(tuned())
model = tuned()
with_copy = first_loss(model, copy.deepcopy(model))
print("first loss: as loaded", loaded, "tuned in memory", in_memory, "with a copy", with_copy)
assert abs(loaded - math.log(2)) < 1e-4 and abs(with_copy - math.log(2)) < 1e-4
assert abs(in_memory - math.log(2)) > 0.1
PY
echo "as described"
