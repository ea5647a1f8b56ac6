#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): save_pretrained of an X-LoRA model writes the LoRA adapters
# that it mixes, and not the router that was trained: its file adapter_model.safetensors holds no tensor (40 bytes).
#
# X-LoRA's only trained weights are the router's. PeftModel.from_pretrained on the folder raises nothing, warns of
# nothing, and answers with a router drawn at random. (`model.internal_xlora_classifier.state_dict()` saves it by hand.)
#
# Seen: 130 trainable numbers, file of 40 bytes, 0 tensors; router's weights reloaded: not those saved.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import copy
import os

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, use_cache=False,
    )
).eval()
for name in ("0", "1"):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained("expert_" + name)

config = XLoraConfig(
    task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1,
    adapters={name: os.path.abspath("expert_" + name) for name in ("0", "1")},
)
model = get_peft_model(copy.deepcopy(base), config).eval()
router = {name: w for name, w in model.named_parameters() if w.requires_grad}
print("trained:", {name: tuple(weight.shape) for name, weight in router.items()})
assert all("xlora_classifier" in name for name in router)
model.save_pretrained("saved")
file = "saved/adapter_model.safetensors"
print(os.listdir("saved"), os.path.getsize(file), "bytes,", len(load_file(file)), "tensors")

again = PeftModel.from_pretrained(copy.deepcopy(base), "saved").eval()
loaded = dict(again.named_parameters())
tokens = torch.tensor([[5, 9, 33, 120, 7]])
with torch.no_grad():
    off = (again(tokens).logits - model(tokens).logits).abs().max().item()
same = [torch.equal(loaded[name], weight) for name, weight in router.items()]
print("router as saved:", same, "logits off by", off)
assert len(load_file(file)) == 0 and not all(same) and off > 1e-4
PY
echo "as described"
