#!/usr/bin/env bash
# trl 1.16.0 with peft 0.21.2, bitsandbytes 0.50.2 and transformers 5.23.0 (torch 2.13.0, CPU): SFTTrainer on a 4-bit
# model turns the adapter's float32 weights to bfloat16, though bf16=False was asked for, and keeps the optimizer on them.
#
# PEFT makes LoRA weights float32 on purpose. In bfloat16 (8 bits of precision) an AdamW step is rounded away where a
# weight is more than 512 times the rate or so: at 1e-5 most of lora_A never moves. On a card with fp16=True,
# bfloat16 gradients also end in an error of the gradient scaler. No warning; on a model that is not quantized the
# adapter stays float32. Cure, after the trainer is built and before train():
# `for p in trainer.model.parameters(): if p.requires_grad: p.data = p.data.float()`.
#
# Seen: trainable dtypes before and after SFTTrainer(...): float32, bfloat16; lora_A numbers changed by 6 steps at
# 1e-5: 0.037 of all, with the cure 1.0.
set -euo pipefail
export CUDA_VISIBLE_DEVICES=""  # transformers puts a 4-bit model on a card where there is one
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  torch==2.13.0 trl==1.16.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 \
  bitsandbytes==0.50.2 datasets==5.2.0
cd "$place"
"$place/env/bin/python" - <<'PY'
import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

datasets.disable_progress_bars()
words = "<pad> <eos> <unk> how are you fine thanks".split()
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
texts = Dataset.from_list([{"prompt": "how are you", "completion": " fine thanks"}] * 12)
torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )
).save_pretrained("base")


def trainable(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def dtypes(model):
    return {weight.dtype for weight in trainable(model).values()}


def train(quantization, cure=False):
    """Dtypes before and after the trainer is built, and the share of lora_A that changed."""
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(
        "base", quantization_config=quantization, dtype=torch.float32
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    before = dtypes(model)
    arguments = SFTConfig(
        "out", max_steps=6, learning_rate=1e-5, lr_scheduler_type="constant", bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, gradient_checkpointing=False,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=texts, processing_class=tokenizer)
    assert not trainer.args.bf16
    after = dtypes(trainer.model)
    if cure:
        for weight in trainable(trainer.model).values():
            weight.data = weight.data.float()
    start = {n: w.detach().clone() for n, w in trainable(trainer.model).items() if "lora_A" in n}
    trainer.train()
    end = trainable(trainer.model)
    changed = sum(int((end[name] != weight).sum()) for name, weight in start.items())
    return before, after, changed / sum(weight.numel() for weight in start.values())


four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
plain = train(None)
quantized = train(four_bits)
cured = train(four_bits, cure=True)
print("not quantized: dtypes before and after, share of lora_A changed:", *plain)
print("4-bit:", *quantized)
print("4-bit, cast back to float32:", *cured)
assert plain[:2] == ({torch.float32}, {torch.float32})
assert quantized[:2] == ({torch.float32}, {torch.bfloat16})
assert quantized[2] < 0.3 and cured[2] > 0.9 and plain[2] > 0.9
PY
echo "as described"
