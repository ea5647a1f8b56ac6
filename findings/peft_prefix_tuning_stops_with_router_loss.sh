#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0 (torch 2.13.0, CPU): prefix tuning of a mixture of experts raises in the loss
# when output_router_logits is on and an attention mask is given, as every collator gives one.
#
# PEFT lengthens the mask by the prefix, which is there as keys and values only and passed no router; the load-balancing
# loss takes the mask's length for that of the tokens. Without a mask the same call works, as LoRA does with one.
# Cure: no mask where nothing is padded, or output_router_logits=False.
#
# Seen (Mixtral, Qwen3-MoE; 5 tokens, prefix of 4): RuntimeError "The size of tensor a (5) must match the size of
# tensor b (9)"; without a mask, without the router's loss, or with LoRA: a loss.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

text = torch.tensor([[5, 9, 33, 120, 7]])
mask = torch.ones_like(text)
sizes = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2,
)
kinds = {
    "Mixtral": lambda **more: MixtralConfig(num_local_experts=4, **sizes, **more),
    "Qwen3-MoE": lambda **more: Qwen3MoeConfig(
        num_experts=4, head_dim=16, moe_intermediate_size=32, **sizes, **more
    ),
}
adapters = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def loss(model, **inputs):
    try:
        return float(model(text, labels=text, **inputs).loss.detach())
    except RuntimeError as error:
        return str(error)


for kind, make_config in kinds.items():
    for method, adapter in adapters.items():
        for with_router in False, True:
            torch.manual_seed(0)
            base = AutoModelForCausalLM.from_config(make_config(output_router_logits=with_router))
            model = get_peft_model(base, adapter)
            masked, bare = loss(model, attention_mask=mask), loss(model)
            print(kind, method, "router's loss:", with_router)
            print("  loss with a mask:", masked, "without:", bare)
            assert isinstance(bare, float)
            if method == "prefix tuning" and with_router:
                assert "size of tensor a (5) must match the size of tensor b (9)" in masked
            else:
                assert isinstance(masked, float)
PY
echo "as described"
