#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, CPU): in gpt-oss and AFMoE, a text packed behind another one attends to it,
# though its position_ids start again at 0. No error and no warning.
#
# In Llama and most others, position_ids that start again (no attention mask, no cache) keep the texts of a packed row
# apart, as padding-free collators rely on. These two models make their masks without the position_ids, so a packed
# training mixes its examples.
#
# Seen, logits of the second text packed against alone, relative change: Llama 4e-7, gpt-oss 1.2, AFMoE 1.3.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from transformers import AfmoeConfig, AutoModelForCausalLM, GptOssConfig, LlamaConfig

first, second = [5, 9, 33, 120, 7], [200, 41, 8, 99]
packed = torch.tensor([first + second])
places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])  # the second text starts again at 0
sizes = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)
experts = dict(num_experts_per_tok=2, **sizes)
kinds = {
    "Llama": LlamaConfig(**sizes),
    "gpt-oss": GptOssConfig(num_local_experts=4, **experts),
    "AFMoE": AfmoeConfig(num_experts=4, moe_intermediate_size=32, num_dense_layers=1, **experts),
}
for kind, config in kinds.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:  # greater than at random, as in a trained model
                value.copy_(torch.randn_like(value) * 0.2)
        alone = model(torch.tensor([second])).logits[0]
        behind = model(packed, position_ids=places, use_cache=False).logits[0, len(first):]
    change = float((behind - alone).norm() / alone.norm())
    print(kind, "the second text's logits change (relative) by", change)
    assert change < 1e-4 if kind == "Llama" else change > 0.01
PY
echo "as described"
