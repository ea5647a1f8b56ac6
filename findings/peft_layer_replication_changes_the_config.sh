#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): LoRA with layer_replication writes the new depth into the
# configuration object that the caller made the model from, and the next model made from it is as deep.
#
# A baseline made from the same object, to compare with, has fresh layers more and is another model, without a word.
# unload(), which should give the base model back, leaves the replicated layers in as well.
# Cure: make each model from copy.deepcopy(config).
#
# Seen (2 layers, replicated to 4): the caller's num_hidden_layers 4; the next model 4 layers; after unload() 4.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128,
    num_hidden_layers=2, num_attention_heads=4,
)


model = get_peft_model(
    LlamaForCausalLM(config),
    LoraConfig(task_type="CAUSAL_LM", layer_replication=[[0, 2], [0, 2]]),
)
print("layers in the caller's configuration:", config.num_hidden_layers)
assert config.num_hidden_layers == 4

baseline = LlamaForCausalLM(config)  # meant as the same model without an adapter
print("layers of the next model made from it:", len(baseline.model.layers))
assert len(baseline.model.layers) == 4

plain = model.unload()
print("layers after unload():", len(plain.model.layers))
assert len(plain.model.layers) == 4
PY
echo "as described"
