#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0 and trl 1.16.0 (torch 2.13.0, CPU): AdaLoRA's orthogonality penalty is a part
# of every loss that the model returns, and each trainer makes something else of it.
#
# 1. It is in the loss of model.eval() and of `disable_adapter()`, too, where the answer is the base model's: the
#    "loss of the base" is too high by the penalty.
# 2. Trainer multiplies it by gradient_accumulation_steps: transformers divides the model's loss by the tokens of all
#    the steps, not the penalty. 16 steps weigh it 16 times.
# 3. SFTTrainer takes its loss from elsewhere: the penalty is gone, AdaLoRA trains without it.
#
# Seen: base model's loss 5.37; with the adapter disabled 6.75; Trainer's first loss 6.75, 10.89, 27.45 for 1, 4, 16
# accumulation steps; SFTTrainer's 5.37.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 trl==1.16.0 datasets==5.2.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import datasets
import torch
from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

datasets.disable_progress_bars()
settings = dict(
    max_steps=1, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
    save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
)
words = "<pad> <eos> <unk> how are you fine thanks".split()
row = {"input_ids": [3, 4, 5, 6, 7, 1], "labels": [-100, -100, -100, 6, 7, 1]}
batch = {name: torch.tensor([value]) for name, value in row.items()}


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def adalora():
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=10, tinit=1, tfinal=1, init_r=8, target_r=2
    )
    return get_peft_model(tiny(), config)


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


with torch.no_grad():
    base = tiny().eval()(**batch).loss.item()
    model = adalora().eval()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, tiny().eval()(**batch).logits)
        disabled = model(**batch).loss.item()
print("loss: base", base, "adapter disabled, eval mode", disabled)

accumulated = {
    steps: first_loss(
        Trainer(
            adalora(),
            TrainingArguments("out", gradient_accumulation_steps=steps, **settings),
            train_dataset=[row] * 64,
        )
    )
    for steps in (1, 4, 16)
}
print("Trainer, by accumulation steps", accumulated)

core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
texts = Dataset.from_list([{"prompt": "how are you", "completion": " fine thanks"}] * 4)
sft = first_loss(
    SFTTrainer(adalora(), args=SFTConfig("out", **settings), train_dataset=texts,
               processing_class=tokenizer)
)
print("SFTTrainer", sft)

penalty = disabled - base
assert penalty > 0.5
for steps, loss in accumulated.items():
    assert abs((loss - base) / penalty - steps) < 0.1 * steps, (steps, loss)
assert abs(sft - base) < 0.05
PY
echo "as described"
