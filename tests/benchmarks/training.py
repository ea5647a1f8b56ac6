"""Real tokens a second of five ways to train the built-in model, in turn.

    python -m tests.benchmarks.training [--methods full lora qlora] [--rounds 3]

All train on the same records, `EXAMPLES` a step. The paths of a round run one after
the other, and each round begins with another path, so that a busy machine is busy for
all. A step's first run is left out. Padding is not counted as tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from course_utils.data import load_examples
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.models import load_model, load_tokenizer, release
from course_utils.runtime import get_profile, set_seed
from course_utils.training import completion_loss, prepare_trainer, sft_config
from course_utils.training_speed import SeededBatches, set_attention

EXAMPLES = 8
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}
PATHS = ("classic", "sft_defaults", "bare_loop", "course")


class Clock(TrainerCallback):
    """Seconds of each optimiser step, and the real tokens of each batch."""

    def __init__(self, collator):
        self.collator, self.tokens, self.seconds = collator, [], []

    def __call__(self, examples):
        batch = self.collator(examples)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)

    def tokens_per_s(self, batches_per_step=1):
        steps = len(self.seconds)
        tokens = [
            sum(self.tokens[i * batches_per_step : (i + 1) * batches_per_step])
            for i in range(steps)
        ]
        return sum(tokens[1:]) / sum(self.seconds[1:])


def make_model(method, *, dtype):
    if method == "full":
        return load_model(dtype=torch.float32)
    if method == "qlora":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        model = load_model(dtype=dtype, quantization=settings)
    else:
        model = load_model(dtype=dtype)
    return get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))


def classic(method, records, tokenizer, steps, folder):
    """Trainer, fp32, padded to 256, batch 1 × accumulation 8."""
    collator = CompletionCollator(tokenizer, pad_to_multiple_of=256)
    clock = Clock(collator)
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=EXAMPLES,
        max_steps=steps,
        learning_rate=RATES[method],
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=make_model(method, dtype=torch.float32),
        args=args,
        train_dataset=tokenize_dataset(records, tokenizer),
        data_collator=clock,
        callbacks=[clock],
    )
    trainer.train()
    return trainer, clock.tokens_per_s(EXAMPLES)


def sft_defaults(method, records, tokenizer, steps, folder):
    """SFTTrainer as it comes: prompt and completion, its collator and checkpointing."""
    rows = [
        {
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "completion": [{"role": "assistant", "content": record["completion"]}],
        }
        for record in records
    ]
    trainer = SFTTrainer(
        model=make_model(method, dtype=torch.float32),
        args=SFTConfig(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=EXAMPLES,
            max_steps=steps,
            learning_rate=RATES[method],
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    clock = Clock(trainer.data_collator)
    trainer.data_collator = clock
    trainer.add_callback(clock)
    trainer.train()
    return trainer, clock.tokens_per_s()


def bare_loop(method, records, tokenizer, steps, folder):
    """The course's ingredients in a loop of plain PyTorch."""
    profile = get_profile()
    model = make_model(method, dtype=profile.dtype).train()
    set_attention(model, "eager")
    data = tokenize_dataset(records, tokenizer)
    lengths = [len(ids) for ids in data["input_ids"]]
    order = list(SeededBatches(lengths, EXAMPLES, 0))
    collator = CompletionCollator(tokenizer)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATES[method], fused=True)
    seconds = tokens = 0.0
    for step in range(steps):
        start = time.perf_counter()
        rows = order[step * EXAMPLES : (step + 1) * EXAMPLES]
        batch = collator([data[i] for i in rows])
        bf16 = profile.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = completion_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step:
            seconds += time.perf_counter() - start
            tokens += int(batch["attention_mask"].sum())
    return model, tokens / seconds


def course(method, records, tokenizer, steps, folder):
    """SFTTrainer made ready by `prepare_trainer`."""
    profile = get_profile()
    clock = Clock(CompletionCollator(tokenizer))
    trainer = SFTTrainer(
        model=make_model(method, dtype=profile.dtype),
        args=sft_config(
            profile,
            folder,
            per_device_train_batch_size=EXAMPLES,
            max_steps=steps,
            learning_rate=RATES[method],
        ),
        train_dataset=tokenize_dataset(records, tokenizer),
        data_collator=clock,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    prepare_trainer(trainer, every=10**9)
    trainer.train()
    return trainer, clock.tokens_per_s()


def measure(methods, rounds, steps, paths=PATHS):
    """Tokens a second of each (method, path), one figure a round."""
    records, tokenizer = load_examples("home_commands"), load_tokenizer()
    found = {(method, path): [] for method in methods for path in paths}
    for number in range(rounds):
        for method in methods:
            turn = number % len(paths)
            for path in (*paths[turn:], *paths[:turn]):
                set_seed(0)
                few = records.select(range(EXAMPLES * (steps + 2)))
                with tempfile.TemporaryDirectory() as folder:
                    holder, speed = globals()[path](
                        method, few, tokenizer, steps, folder
                    )
                release(holder)
                found[method, path].append(speed)
                print(f"round {number + 1} · {method} · {path} · {speed:.0f} tokens/s")
    return found


def table(found):
    """Lines: median, least and greatest, and the ratio to the classic recipe."""
    lines = [f"{'method':<7}{'path':<14}{'tokens/s':>9}{'least':>7}{'most':>7}  ratio"]
    for (method, path), speeds in found.items():
        middle = statistics.median(speeds)
        base = statistics.median(found.get((method, "classic"), speeds))
        lines.append(
            f"{method:<7}{path:<14}{middle:9.0f}{min(speeds):7.0f}{max(speeds):7.0f}"
            f"  {middle / base:.2f}"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora"])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args()
    result = measure(chosen.methods, chosen.rounds, chosen.steps, tuple(chosen.paths))
    print("\n".join(table(result)))
