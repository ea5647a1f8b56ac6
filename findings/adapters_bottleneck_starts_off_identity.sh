#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6 (torch 2.13.0, CPU): a new bottleneck adapter changes the model before it
# is trained. One expects the identity (a zero "up", as LoRA's B); by default both matrices are drawn with a spread
# of 0.02, and only init_weights="mam_adapter" begins at the plain model. So adding an adapter moves the answers.
#
# What it computes is h + up(act(down(h))), once behind the attention and once behind the MLP, before each residual
# sum: the few lines of `Bottleneck` below are equal to it with random weights, and 1 % in one matrix is noticed.
# (The library pins transformers 4.57, so the two cannot be shown equal beside transformers 5.)
#
# Seen: the start moves logits by 7e-03 of their size, with "mam_adapter" by 0; ours equal to the bit, 1 % off 5e-03.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 transformers==4.57.6 adapters==1.3.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import adapters
import torch
from adapters import DoubleSeqBnConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.tensor([[5, 9, 33, 120, 7]])


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def adapted(**options):
    torch.manual_seed(1)
    model = tiny()
    adapters.init(model)
    model.add_adapter("task", config=DoubleSeqBnConfig(non_linearity="gelu", **options))
    model.train_adapter("task")
    return model.eval()


class Bottleneck(nn.Module):
    def __init__(self, d, m):
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)

    def forward(self, h):
        return h + self.up(nn.functional.gelu(self.down(h)))


@torch.no_grad()
def moved(model, other):
    a, b = model(tokens).logits, other(tokens).logits
    return ((a - b).abs().max() / b.abs().max()).item()


start, zero = moved(adapted(), tiny()), moved(adapted(init_weights="mam_adapter"), tiny())
print(f"an untrained adapter moves the logits by {start:.0e} of their size, mam_adapter by {zero:.0e}")
assert start > 1e-4 and zero == 0

theirs, ours = adapted(), tiny()
trained = [p for p in theirs.parameters() if p.requires_grad]
assert sum(p.numel() for p in trained) == 2 * 2 * (2 * 64 * 4 + 4 + 64)
with torch.no_grad():
    for p in trained:
        p.normal_(std=0.3)
for block, other in zip(ours.model.layers, theirs.model.layers):
    for place, name, kind in (
        (block.self_attn, "o_proj", other.attention_adapters),
        (block.mlp, "down_proj", other.output_adapters),
    ):
        bottleneck, source = Bottleneck(64, 4), kind.adapters["task"]
        bottleneck.down.load_state_dict(source.adapter_down[0].state_dict())
        bottleneck.up.load_state_dict(source.adapter_up.state_dict())
        setattr(place, name, nn.Sequential(getattr(place, name), bottleneck))
equal, effect = moved(ours, theirs), moved(theirs, tiny())
bottleneck.up.weight.data *= 1.01
wrong = moved(ours, theirs)
print(f"the adapter moves the logits by {effect:.0e}; ours off by {equal:.0e}; one matrix 1 % larger {wrong:.0e}")
assert equal < 1e-5 < 1e-4 < wrong < effect
PY
echo "as described"
