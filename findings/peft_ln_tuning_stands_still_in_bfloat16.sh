#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): LN tuning of a bfloat16 model trains in bfloat16, unlike LoRA,
# and at usual rates AdamW then changes nothing at all: a norm's weight is near 1, where bfloat16 numbers lie 2^-7
# (above) and 2^-8 (below) apart, and a step of 1e-3 is rounded away, each time.
#
# PEFT casts an adapter's weights to float32 on a bfloat16 or float16 base (autocast_adapter_dtype=True, the default),
# but not those of LN tuning, which are copies of the base's own modules (modules_to_save neither). The loss does not
# fall, no warning is given, and the saved adapter is the base's norms.
# Cure: `for p in model.parameters(): if p.requires_grad: p.data = p.data.float()`, and autocast.
#
# Seen, after 20 steps of AdamW at 1e-3: LoRA trained in float32, LN tuning in bfloat16; norm weights changed:
# 320 of 320 on a float32 base, 0 of 320 on a bfloat16 base.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.tensor([[5, 9, 33, 120, 7]])


def tiny(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )
    return LlamaForCausalLM(config).to(dtype)


def trainable(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def changed(dtype):
    weights = trainable(model := get_peft_model(tiny(dtype), LNTuningConfig(task_type="CAUSAL_LM")))
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = sum(int((a != b).sum()) for a, b in zip(weights, before))
    print("LN tuning on", dtype, "trains", {w.dtype for w in weights}, "changed", moved,
          "of", sum(w.numel() for w in weights))
    return moved, {weight.dtype for weight in weights}


lora = get_peft_model(tiny(torch.bfloat16), LoraConfig(task_type="CAUSAL_LM"))
print("LoRA on torch.bfloat16 trains", {weight.dtype for weight in trainable(lora)})
assert {weight.dtype for weight in trainable(lora)} == {torch.float32}
assert changed(torch.float32) == (320, {torch.float32})
assert changed(torch.bfloat16) == (0, {torch.bfloat16})
PY
echo "as described"
