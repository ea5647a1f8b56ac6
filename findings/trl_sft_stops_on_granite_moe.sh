#!/usr/bin/env bash
# trl 1.16.0 (torch 2.13.0, transformers 5.23.0, CPU): SFTTrainer with nothing set stops in its first step on a
# Granite-MoE or Phi-MoE, as their configurations do not call the number of experts num_experts.
#
# SFTTrainer switches the router's auxiliary loss on for every model that has one, and computes it in a forward pass of
# its own, which asks the configuration for a name that only some families have. The models' own forward pass computes
# that loss without trouble. Cure: router_aux_loss_coef=0.0, which leaves the auxiliary loss out.
#
# Seen: Granite-MoE, Phi-MoE: AttributeError "... object has no attribute 'num_experts'" at step 0, from
# trl's _fused_forward; with router_aux_loss_coef=0.0: trains; Mixtral: trains.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  trl==1.16.0 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import traceback

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, GraniteMoeConfig, MixtralConfig, PhimoeConfig,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

words = {word: number for number, word in enumerate("<pad> <eos> a b c d e".split())}
made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
data = Dataset.from_list([{"text": "a b c d e"}, {"text": "b c d"}] * 4)
sizes = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
kinds = {"Mixtral": MixtralConfig, "Granite-MoE": GraniteMoeConfig, "Phi-MoE": PhimoeConfig}


def train(make_config, **settings):
    """Two steps of SFTTrainer: None, or the error, trl's function in it, and the steps done."""
    torch.manual_seed(0)
    arguments = SFTConfig(
        "out", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", max_steps=2, bf16=False, **settings,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_config(make_config(**sizes)), arguments,
        train_dataset=data, processing_class=tokenizer,
    )
    try:
        trainer.train()
    except AttributeError as error:
        places = [frame.name for frame in traceback.extract_tb(error.__traceback__)
                  if "/trl/" in frame.filename]
        return str(error), places[-1], trainer.state.global_step


for kind, make_config in kinds.items():
    row = torch.tensor([[2, 3, 4]])
    itself = AutoModelForCausalLM.from_config(make_config(**sizes))
    assert itself(row, labels=row, output_router_logits=True).aux_loss.isfinite()
    failed = train(make_config)
    print(kind, "as it comes:", failed or "trains")
    if kind == "Mixtral":
        assert failed is None
    else:
        assert "has no attribute 'num_experts'" in failed[0] and failed[2] == 0
    assert train(make_config, router_aux_loss_coef=0.0) is None
PY
echo "as described"
