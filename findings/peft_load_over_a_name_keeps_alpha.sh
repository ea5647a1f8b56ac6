#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): load_adapter(folder, name) onto a name that is in use loads the
# weights and keeps the old adapter's alpha: the new adapter acts at the wrong strength. It reports
# "All keys matched successfully".
#
# The name's configuration is taken from the model if it is there already, and the folder's is not looked at. The same
# happens to every setting that is not in the weights: use_rslora, alpha_pattern.
# Cure: delete_adapter(name) before, or another name.
#
# Seen: adapter of alpha 64 over one of alpha 4, rank 4: scaling 1.0 instead of 16.0, weights those of the file,
# lora_alpha 4; after delete_adapter, or under a new name: equal to the adapter saved.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )
).eval()
tokens = torch.tensor([[5, 9, 33, 120, 7]])


@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits


def saved(alpha):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=alpha, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(f"alpha_{alpha}")
    return model


def projection(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


saved(4)
right = saved(64)
model = PeftModel.from_pretrained(copy.deepcopy(base), "alpha_4")
result = model.load_adapter("alpha_64", "default")
scaling, alpha = projection(model).scaling["default"], model.peft_config["default"].lora_alpha
off = (logits(model) - logits(right)).abs().max().item()
print(result, "scaling", scaling, "lora_alpha", alpha, "logits off by", off)
assert not result.missing_keys and not result.unexpected_keys
assert torch.equal(
    projection(model).lora_A["default"].weight, projection(right).lora_A["default"].weight
)
assert (scaling, alpha, projection(right).scaling["default"]) == (1.0, 4, 16.0) and off > 0.01

model.load_adapter("alpha_64", "new name")
model.set_adapter("new name")
assert torch.equal(logits(model), logits(right))
model = PeftModel.from_pretrained(copy.deepcopy(base), "alpha_4")
model.delete_adapter("default")
model.load_adapter("alpha_64", "default")
model.set_adapter("default")
print("after delete_adapter: scaling", projection(model).scaling["default"])
assert torch.equal(logits(model), logits(right))
PY
echo "as described"
