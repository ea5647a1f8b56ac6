#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0, CPU): Trainer's eval_loss changes with
# per_device_eval_batch_size, same model and same texts. It is no mean over tokens, as the training loss is.
#
# Each batch's loss is a mean over its tokens, and eval_loss the mean of those over the rows: a short text counts as
# much as a long one of another batch. Since version 4.46 training divides by the tokens of all accumulated batches;
# evaluation still does not. exp(eval_loss) is not the perplexity per token, and two runs that evaluate in batches of
# unlike size cannot be compared. With one batch, or texts of one length, it is the mean over tokens.
#
# Seen, three texts of 3 tokens and one of 60: 7.89, 7.58, 7.01 for batches of 1, 2 and 4; over all tokens 7.01.
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

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.2,
)
model = LlamaForCausalLM(config).eval()
texts = [[1, 2, 3]] * 3 + [list(range(10, 70))]
rows = [{"input_ids": text, "labels": text} for text in texts]


def collate(batch):
    length = max(len(row["input_ids"]) for row in batch)

    def padded(values, by):
        return values + [by] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in batch]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in batch]),
        "attention_mask": torch.tensor([padded([1] * len(row["labels"]), 0) for row in batch]),
    }


def eval_loss(batch_size):
    arguments = TrainingArguments(
        "out", report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_eval_batch_size=batch_size,
    )
    trainer = Trainer(model, arguments, eval_dataset=rows, data_collator=collate)
    return trainer.evaluate()["eval_loss"]


with torch.no_grad():
    sums = [
        model(input_ids=x, labels=x).loss.item() * (x.shape[1] - 1)
        for x in (torch.tensor([text]) for text in texts)
    ]
by_token = sum(sums) / sum(len(text) - 1 for text in texts)
losses = {batch_size: eval_loss(batch_size) for batch_size in (1, 2, 4)}
print("over all tokens", by_token, "eval_loss by batch size", losses)
assert abs(losses[4] - by_token) < 1e-4
assert all(abs(losses[a] - losses[b]) > 0.1 for a, b in [(1, 2), (2, 4), (1, 4)])
PY
echo "as described"
