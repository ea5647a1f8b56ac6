#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): low_cpu_mem_usage=True unties a trained embedding and head,
# though the adapter's configuration says ensure_weight_tying=True. No error and no warning.
#
# The option is meant to load faster, not to make another model. With it, PeftModel.from_pretrained and
# get_peft_model give the head a copy of its own, and the next step of training moves the two apart.
#
# Seen (tiny Qwen3, tied; LoRA with modules_to_save of both): 18,944 parameters trained, head and embedding the same
# after a step; loaded with low_cpu_mem_usage=True: 35,328 trained, 0.02 apart after a step at rate 1e-2.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

text = torch.tensor([[5, 9, 33, 120, 7]])
adapter = LoraConfig(
    task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"],
    modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True,
)


def tiny():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def step(model):
    """One step of training; then, are embedding and head still the same?"""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(text, labels=text).loss.backward()
    optimizer.step()
    head = model.get_output_embeddings().modules_to_save["default"].weight
    embedding = model.get_input_embeddings().modules_to_save["default"].weight
    return (head - embedding).abs().max().item()


first = get_peft_model(tiny(), adapter)
apart = step(first)
trained = first.get_nb_trainable_parameters()[0]
print("trained at first:", trained, "head and embedding apart:", apart)
assert trained == 18_944 and apart == 0
first.save_pretrained("adapter")

for low, expected in (False, 18_944), (True, 35_328):
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(
            tiny(), "adapter", is_trainable=True, low_cpu_mem_usage=low
        )
        made = get_peft_model(tiny(), adapter, low_cpu_mem_usage=low)
    said = [str(warning.message) for warning in kept if "tie" in str(warning.message).lower()]
    trained = model.get_nb_trainable_parameters()[0]
    apart = step(model)
    print("low_cpu_mem_usage", low, "trained:", trained, "apart after a step:", apart, said)
    assert trained == made.get_nb_trainable_parameters()[0] == expected
    assert (apart > 0.001) == low and not said
PY
echo "as described"
