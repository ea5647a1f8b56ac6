#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): in a mixed batch, model(..., adapter_names=[...]), every row
# of most adapter types is answered by the active adapter, whatever name it asked for. No error and no warning.
#
# LoRA serves each row by its own adapter ("__base__": none) and refuses a name that it does not know. The argument
# is accepted for every type, though, and IA3, OFT, LoHa and most others drop it: also names that do not exist.
# A server that mixes users' IA3 adapters in a batch answers all of them with one user's adapter.
#
# Seen: LoRA: rows as asked, ValueError for an unknown name; IA3, OFT, LoHa: rows "other" and "__base__" equal to the
# row "default" to the bit, "no such adapter" accepted.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

rows = torch.tensor([[5, 9, 33, 120, 7]] * 3)
names = ["default", "other", "__base__"]


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def mixed_batch(make_config):
    """Row by row: as when its adapter is the active one? And is an unknown name refused?"""
    model = get_peft_model(tiny(), make_config())
    model.add_adapter("other", make_config())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".default" in name or ".other" in name:  # both far from doing nothing
                value.copy_(torch.randn_like(value) * 0.3)
    model.eval()
    alone = []
    for name in names[:2]:
        model.set_adapter(name)
        alone.append(model(rows[:1]).logits[0])
    with model.disable_adapter():
        alone.append(model(rows[:1]).logits[0])
    model.set_adapter("default")
    assert (alone[0] - alone[1]).abs().max() > 0.01
    assert (alone[0] - alone[2]).abs().max() > 0.01
    answers = model(rows, adapter_names=names).logits
    right = [torch.allclose(a, b, atol=1e-4) for a, b in zip(answers, alone)]
    as_first = [torch.equal(answer, answers[0]) for answer in answers]
    try:
        model(rows, adapter_names=["no such adapter"] * 3)
        refused = False
    except ValueError:
        refused = True
    return right, as_first, refused


configs = {
    "LoRA": lambda: LoraConfig(task_type="CAUSAL_LM"),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "OFT": lambda: OFTConfig(task_type="CAUSAL_LM", oft_block_size=4),
    "LoHa": lambda: LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
}
for method, make_config in configs.items():
    right, as_first, refused = mixed_batch(make_config)
    print(method, dict(zip(names, right)), "unknown name refused:", refused)
    if method == "LoRA":
        assert all(right) and refused
    else:
        assert right == [True, False, False] and all(as_first) and not refused
PY
echo "as described"
