#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0, CPU): with prompt tuning or P-tuning a decoder used as a classifier
# (task_type="SEQ_CLS") reads the padding: padded on the right, the same text gets another answer.
#
# Llama's classifier looks for the last token that is no padding by the token ids. Prompt tuning hands over embeddings,
# so it takes the last place, whatever the attention mask says. transformers says so once, in a line of its log.
# Texts of unlike length in a batch, padded on the right as most tokenizers do, are classified by their padding.
# LoRA and prefix tuning, which leave the token ids, are right with it.
#
# Seen: change of the logits by five padding tokens on the right, as a share of the largest logit: LoRA 6e-8, prefix
# tuning 3e-7, prompt tuning 0.56, P-tuning 2.7. On the left: 0.004 and 0.02 for the last two (the virtual tokens
# stand before the padding, further away).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import torch
from peft import (
    LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model,
)
from transformers import LlamaConfig, LlamaForSequenceClassification

configs = {
    "LoRA": LoraConfig(task_type="SEQ_CLS", init_lora_weights=False),
    "prefix tuning": PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
    "prompt tuning": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
    "P-tuning": PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, encoder_hidden_size=16
    ),
}
text = torch.tensor([[5, 9, 33, 120, 7]])
padding = torch.zeros(1, 5, dtype=torch.long)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, attention_mask=(tokens != 0).long()).logits


for method, config in configs.items():
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, pad_token_id=0, num_labels=3,
        )
    )
    model = get_peft_model(base, config).eval()
    alone = logits(model, text)
    right, left = (
        ((logits(model, tokens) - alone).abs().max() / alone.abs().max()).item()
        for tokens in (torch.cat([text, padding], 1), torch.cat([padding, text], 1))
    )
    print(method, "padded right: changed by", right, "padded left:", left)
    if method in ("LoRA", "prefix tuning"):
        assert right < 1e-4
    else:
        assert right > 0.2 and left < 0.1 * right
PY
echo "as described"
