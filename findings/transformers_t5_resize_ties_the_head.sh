#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, CPU): `T5Config(tie_word_embeddings=False)` says True, and a T5 with an output matrix
# of its own, as T5 1.1 and Flan-T5 have it, loses that matrix in `resize_token_embeddings`.
#
# Loading such a folder keeps both matrices, with a warning. Adding tokens then ties them: the output matrix becomes the
# embedding, its own numbers are gone, and what is printed speaks of new rows only. A model built from a configuration
# has one matrix for both in any case, so a count of parameters comes out V x d too small.
#
# Seen: False given, True read back; reloaded equal to the bit; after adding four tokens one matrix, old logits changed
# by more than their own length.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from transformers import T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
shape = {"vocab_size": 100, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
config = T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
print("tie_word_embeddings=False reads back as", config.tie_word_embeddings)
assert config.tie_word_embeddings is True

model = T5ForConditionalGeneration(config).eval()
print("one matrix for both:", model.lm_head.weight is model.shared.weight)
assert model.lm_head.weight is model.shared.weight
model.lm_head.weight = torch.nn.Parameter(torch.randn(100, 16))
model.save_pretrained("own_head")


def logits(model):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids).logits[..., :100]


expected = logits(model)
loaded = T5ForConditionalGeneration.from_pretrained("own_head").eval()
assert loaded.lm_head.weight is not loaded.shared.weight
assert torch.equal(logits(loaded), expected)

loaded.resize_token_embeddings(104)
changed = ((logits(loaded) - expected).norm() / expected.norm()).item()
print(f"four tokens added: one matrix {loaded.lm_head.weight is loaded.shared.weight}, old logits off by {changed:.2f}")
assert loaded.lm_head.weight is loaded.shared.weight
assert changed > 0.5
PY
echo "as described"
