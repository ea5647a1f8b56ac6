#!/usr/bin/env bash
# accelerate 1.15.0 with transformers 5.23.0 (torch 2.13.0, CPU): a model keeps the precision of the first Trainer
# that it met. A second Trainer on the same model ignores its own bf16, in both ways.
#
# accelerate marks a prepared model and prepares it once only, so autocast is neither wrapped around it by a later
# Trainer(bf16=True) nor taken away by a later Trainer(bf16=False); even plain calls of the model after training
# compute in bfloat16 and hand out float32. TrainingArguments says what was asked for, the log nothing.
# Whoever compares float32 with bf16 on one model, or evaluates "in float32" after training, measures one thing twice.
#
# Seen, dtype of a linear layer's output: bf16 on a fresh model bfloat16; float32 first, then bf16: float32, float32;
# bf16 first, then float32, then a plain call: bfloat16, bfloat16, bfloat16.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2


def tiny():
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=1, num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def train(model, bf16):
    arguments = TrainingArguments(
        "out", max_steps=1, bf16=bf16, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()


def layer_dtype(model, call):
    """The dtype in which the first query projection answers while `call` runs."""
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    call()
    hook.remove()
    return seen[0]


fresh = tiny()
fresh_bf16 = layer_dtype(fresh, lambda: train(fresh, bf16=True))
model = tiny()
up = [layer_dtype(model, lambda: train(model, bf16=bf16)) for bf16 in (False, True)]
model = tiny()
down = [layer_dtype(model, lambda: train(model, bf16=bf16)) for bf16 in (True, False)]
tokens = torch.tensor([[1, 2, 3]])
down.append(layer_dtype(model, lambda: model(tokens)))
print("bf16 on a fresh model:", fresh_bf16)
print("float32, then bf16:", up)
print("bf16, then float32, then a plain call:", down)
assert fresh_bf16 == torch.bfloat16
assert up == [torch.float32] * 2
assert down == [torch.bfloat16] * 3
assert model(tokens).logits.dtype == torch.float32
PY
echo "as described"
