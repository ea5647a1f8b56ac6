"""LitGPT's own LoRA fine-tuning, timed by the step; runs in LitGPT's environment.

    python litgpt_child.py CHECKPOINT DATA RATE STEPS EXAMPLES

CHECKPOINT is a folder with a Hugging Face checkpoint, DATA one with `train.json` and
`val.json`. Prints one line of JSON: seconds, tokens (padding not counted) and loss of
each step. Nothing of LitGPT's loop is changed; its calls of `log_dict` are listened to,
and its shuffling is off, so that it sees the records in the order of the others.

Its warm-up takes a step at least, and that one has a rate of 0: its losses are those of
the others with one step less behind them.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

from lightning import Fabric
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.finetune import lora
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.utils.data import DataLoader

MODEL = "SmolLM2-135M-Instruct"


class InOrder(JSON):
    """LitGPT's own data, not shuffled."""

    def train_dataloader(self):
        shuffled = super().train_dataloader()
        return DataLoader(
            shuffled.dataset, shuffled.batch_size, collate_fn=shuffled.collate_fn
        )


def converted(source: Path) -> Path:
    """The checkpoint in LitGPT's format, made once beside the environment."""
    folder = Path(sys.prefix) / "checkpoints" / MODEL
    if not (folder / "lit_model.pth").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            link = folder / file.name
            if not link.exists():
                link.symlink_to(file)
        convert_hf_checkpoint(folder, model_name=MODEL, dtype="float32")
    return folder


def main(source, data, rate, steps, examples):
    logged = []

    def listen(fabric, metrics, step=None):
        if "iter_time" in metrics:  # its count of tokens is one tensor, that grows
            of_step = {name: float(metrics[name]) for name in ("iter_time", "loss")}
            of_step["tokens"] = int(metrics["tokens"])
            logged.append((time.perf_counter(), of_step))

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Fabric, "log_dict", listen))
        for after in ("save_hyperparameters", "merge_lora"):  # when all is trained
            stack.enter_context(patch.object(lora, after))
        lora.setup(
            converted(Path(source)),
            out_dir=Path(data) / "out",
            lora_dropout=0.0,
            lora_key=True,
            lora_projection=True,
            lora_mlp=True,
            data=InOrder(
                Path(data), mask_prompt=True, prompt_style="smollm2", num_workers=0
            ),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=examples,
                micro_batch_size=examples,
                lr_warmup_steps=1,
                epochs=10,
                max_steps=steps,
            ),
            eval=EvalArgs(interval=10**6, max_new_tokens=1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": rate, "weight_decay": 0.0},
            },
        )
    first = logged[0][0] - logged[0][1]["iter_time"]
    whens = [first, *(when for when, _ in logged)]
    totals = [0, *(metrics["tokens"] for _, metrics in logged)]
    return {
        "seconds": [b - a for a, b in zip(whens, whens[1:], strict=False)],
        "tokens": [b - a for a, b in zip(totals, totals[1:], strict=False)],
        "loss": [metrics["loss"] for _, metrics in logged],
    }


if __name__ == "__main__":
    source, data, rate, steps, examples = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        timing = main(source, data, float(rate), int(steps), int(examples))
    print(json.dumps(timing))
