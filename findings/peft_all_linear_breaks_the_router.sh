#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): LoRA with target_modules="all-linear" on Llama 4 or Phi-MoE
# adapts the router of the experts too, and the first forward pass raises an AttributeError.
#
# In both, the router is a subclass of Linear that gives back a tuple; LoRA takes it for a plain Linear and adds its
# own part to the tuple. get_peft_model does not complain, and the error names neither the router nor LoRA.
# Cure: exclude_modules=["router"].
#
# Seen: Llama 4, Phi-MoE: "'tuple' object has no attribute 'dtype'"; with the router excluded: fine; Mixtral: fine.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Llama4TextConfig, MixtralConfig, PhimoeConfig

text = torch.tensor([[5, 9, 33, 120, 7]])
sizes = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
)
kinds = {
    "Mixtral": MixtralConfig(**sizes),
    "Llama 4": Llama4TextConfig(head_dim=16, intermediate_size_mlp=64, **sizes),
    "Phi-MoE": PhimoeConfig(**sizes),
}
for kind, config in kinds.items():
    base = AutoModelForCausalLM.from_config(config)
    assert base(text).logits.isfinite().all()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    try:
        model(text)
        error = None
    except AttributeError as raised:
        error = str(raised)
    router = [name for name, _ in model.named_parameters() if "router.lora_A" in name]
    print(kind, "router wrapped:", router, "first pass:", error or "fine")
    if kind == "Mixtral":
        assert error is None
    else:
        assert router and error == "'tuple' object has no attribute 'dtype'"
        # the cure:
        adapter = LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=["router"]
        )
        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
        assert model(text).logits.isfinite().all()
PY
echo "as described"
