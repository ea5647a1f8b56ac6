#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2 (torch 2.13.0, CPU): a folder saved in 4 bits loads with a config.json
# whose sizes do not fit its matrices. With another head_dim it answers otherwise, without an error or a warning.
#
# A folder of floats is refused then, with a table of the shapes. In 4 bits a matrix is a packed column and its true
# shape stands beside it; the check skips these, and what is multiplied is the true shape, whatever the layer says of
# itself. Only the vectors and the matrices that are not quantized (embedding, norms, head) are checked.
# So a config.json written by hand, or one put into the wrong folder, is found out in floats and not in 4 bits.
#
# Seen: head_dim 8 or 32 in place of 16: floats refused, 4 bits off by 0.98 and 0.69 (relative); intermediate_size 256
# in place of 128: floats refused, 4 bits right, with layers that claim 256; hidden_size 128: both refused.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$place"
"$place/env/bin/python" - <<'PY'
import json

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

text = torch.tensor([[5, 9, 33, 120, 7]])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128,
    num_hidden_layers=1, num_attention_heads=4, head_dim=16,
)
model = LlamaForCausalLM(config)
with torch.no_grad():
    for value in model.parameters():
        if value.ndim > 1:  # greater than at random, as in a trained model
            value.copy_(torch.randn_like(value) * 0.2)
model.save_pretrained("float")
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
AutoModelForCausalLM.from_pretrained("float", quantization_config=nf4).save_pretrained("four_bits")


def load(folder, **other):
    """The model of a folder whose config.json has other sizes: None if it is refused."""
    with open(f"{folder}/config.json") as file:
        written = json.load(file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(written | other, file)
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print(folder, other, "refused:", error)
    finally:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(written, file)


right = load("four_bits")(text).logits.detach()
for other in {"head_dim": 8}, {"head_dim": 32}, {"intermediate_size": 256}, {"hidden_size": 128}:
    assert load("float", **other) is None
    model = load("four_bits", **other)
    if "hidden_size" in other:
        assert model is None
        continue
    logits = model(text).logits.detach()
    off = float((logits - right).norm() / right.norm())
    print("four_bits", other, "loaded; logits off (relative) by", off)
    print("  says", model.model.layers[0].mlp.up_proj, model.model.layers[0].self_attn.q_proj)
    if "head_dim" in other:
        assert off > 0.1
    else:
        assert off < 1e-4 and model.model.layers[0].mlp.up_proj.out_features == 256
PY
echo "as described"
