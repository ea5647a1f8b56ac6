"""Five ways to train the built-in model on the same records, each timed by the step.

All of them see the same `EXAMPLES` records in the same order, with AdamW, a linear
schedule and the same rates; they differ in what their recipes differ in.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_config, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from course_utils.formatting import (
    IGNORE,
    CompletionCollator,
    pack_examples,
    tokenize_dataset,
)
from course_utils.models import SMOLLM2, load_model, prepare, release
from course_utils.runtime import build_folder, get_profile
from course_utils.sweep.experiment import LORA
from course_utils.training import prepare_trainer, sft_config
from course_utils.training_speed import cast_lora_inputs, set_attention

EXAMPLES = 8  # a step
METHODS = ("full", "lora", "qlora")
RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}
CHILD = Path(__file__).with_name("litgpt_child.py")
TORCHAO = {
    "torchao, weights": "Int8WeightOnlyConfig",
    "torchao, weights and inputs": "Int8DynamicActivationInt8WeightConfig",
}
LAYERS = ("bitsandbytes", *TORCHAO)


@dataclass
class Timing:
    """A training: seconds, real tokens and loss of each step."""

    seconds: list[float]
    tokens: list[int]
    loss: list[float]

    def as_run(self) -> dict:
        """The fields of a recorded run; the first step, a warm-up, stands in it too."""
        return {
            "seconds": sum(self.seconds),
            "loss": self.loss,
            "measured": {"step_seconds": self.seconds, "tokens": self.tokens},
        }


class Clock(TrainerCallback):
    """Around a collator: real tokens of each batch; as a callback: when steps end.

    A step lasts from the end of the one before, so that making the batch counts.
    """

    def __init__(self, collator: Callable) -> None:
        self.collator, self.tokens, self.marks = collator, [], []

    def __call__(self, examples: Sequence) -> dict:
        batch = self.collator(examples)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.marks.append(time.perf_counter())

    def timing(self, trainer: Trainer, batches: int = 1) -> Timing:
        """What was seen, with `batches` batches to a step."""
        seconds = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        tokens = [
            sum(self.tokens[i * batches : (i + 1) * batches])
            for i in range(len(seconds))
        ]
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return Timing(seconds, tokens, loss)


def make_model(method: str, dtype: torch.dtype, layers: str | None = None):
    """The model as a recipe loads it: float32 for full, else frozen in `dtype`.

    `layers` names another library's frozen layers of 8 bits for LoRA: one of `LAYERS`.
    """
    if method == "full":
        return load_model(dtype=torch.float32)
    quantization = None
    if method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif layers == "bitsandbytes":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = load_model(dtype=dtype, quantization=quantization)
    if layers in TORCHAO:
        import torchao.quantization as torchao

        torchao.quantize_(model.model, getattr(torchao, TORCHAO[layers])())
    return get_peft_model(model, get_peft_config({"task_type": "CAUSAL_LM", **LORA}))


def _common(method: str, steps: int, folder: str) -> dict:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": steps,
        "learning_rate": RATES[method],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def classic(method, records, tokenizer, steps, folder) -> Timing:
    """Trainer, fp32, padded to 256, batch 1 × accumulation 8."""
    clock = Clock(CompletionCollator(tokenizer, pad_to_multiple_of=256))
    trainer = Trainer(
        model=make_model(method, torch.float32),
        args=TrainingArguments(
            **_common(method, steps, folder),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=EXAMPLES,
            remove_unused_columns=False,
        ),
        train_dataset=tokenize_dataset(records, tokenizer),
        data_collator=clock,
        callbacks=[clock],
    )
    trainer.train()
    release(trainer)
    return clock.timing(trainer, EXAMPLES)


def sft_defaults(method, records, tokenizer, steps, folder) -> Timing:
    """SFTTrainer as it comes: its collator, attention, loss and checkpointing."""
    rows = [
        {
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "completion": [{"role": "assistant", "content": record["completion"]}],
        }
        for record in records
    ]
    dtype = get_profile().dtype if method == "qlora" else torch.float32
    trainer = SFTTrainer(
        model=make_model(method, dtype),
        args=SFTConfig(
            **_common(method, steps, folder), per_device_train_batch_size=EXAMPLES
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    clock = Clock(trainer.data_collator)
    trainer.data_collator = clock
    trainer.add_callback(clock)
    trainer.train()
    release(trainer)
    return clock.timing(trainer)


def litgpt_python() -> Path | None:
    """The Python of LitGPT's own environment, or None if that was not made."""
    own = build_folder() / "litgpt" / "bin" / "python"
    python = Path(os.environ.get("LITGPT_PYTHON", own))
    return python if python.is_file() else None


def litgpt(method, records, tokenizer, steps, folder) -> Timing:
    """LitGPT's LoRA fine-tuning in an environment of its own, 8 records a step.

    Its default precision (bf16-mixed) and loss; adapters as the others have them.
    """
    if method != "lora":
        raise ValueError("LitGPT is compared in its LoRA fine-tuning alone")
    rows = [
        {"instruction": r["prompt"], "input": "", "output": r["completion"]}
        for r in records
    ]
    data = Path(folder)
    (data / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "val.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    words = [litgpt_python(), CHILD, prepare(SMOLLM2), folder, RATES[method], steps]
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*map(str, words), str(EXAMPLES)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"LitGPT failed:\n{done.stderr[-2000:]}")
    return Timing(**json.loads(done.stdout.strip().splitlines()[-1]))


def side_by_side(
    examples: Sequence[dict], width: int, *, exactly: bool = False
) -> dict[str, torch.Tensor]:
    """All examples of a step in rows of `width` tokens, told apart by positions.

    The rows are cut to the longest of them, unless they are to be `exactly` so wide.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    rows = pack_examples(examples, max(width, longest))
    length = width if exactly else max(len(row["input_ids"]) for row in rows)
    filling = {"input_ids": 0, "labels": IGNORE, "position_ids": 0}
    return {
        name: torch.tensor(
            [row[name] + [value] * (length - len(row[name])) for row in rows]
        )
        for name, value in filling.items()
    }


def compile_blocks(model) -> None:
    """Compile the decoder's block: once, since all layers run the same code.

    Inductor keeps what it made in the course's cache folder.
    """
    folder = prepare(SMOLLM2).parent / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(dynamic=True)


def bare_steps(
    method, records, tokenizer, steps, *, layers=None, compiled=False
) -> Iterator[tuple]:
    """What a strong engineer writes without a trainer: every trick, in plain PyTorch.

    Packed rows, bfloat16 where the processor has it, no logits that no label needs,
    plain attention (the fused kernel's backward is slow here), one fused AdamW;
    `compiled`, too, or on other `layers`, as in `make_model`.

    Yields:
        Of each step: loss, seconds, real tokens.
    """
    dtype = get_profile().dtype
    model = make_model(method, dtype, layers).train()
    base = model if method == "full" else model.get_base_model()
    set_attention(model, "eager")
    cast_lora_inputs(model, dtype != torch.bfloat16)
    if compiled:
        compile_blocks(base.model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATES[method], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    data = tokenize_dataset(records, tokenizer)
    for step in range(steps):
        start = time.perf_counter()
        examples = [data[step * EXAMPLES + i] for i in range(EXAMPLES)]
        batch = side_by_side(examples, 192)
        targets = batch.pop("labels")[:, 1:]
        learned = targets != IGNORE
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = base.model(**batch, use_cache=False).last_hidden_state
            logits = base.lm_head(hidden[:, :-1][learned])
            loss = torch.nn.functional.cross_entropy(logits.float(), targets[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens = sum(len(each["input_ids"]) for each in examples)
        yield loss.item(), time.perf_counter() - start, tokens
    release(model)


def bare_loop(method, records, tokenizer, steps, folder) -> Timing:
    """`bare_steps`, all of them."""
    losses, seconds, tokens = zip(
        *bare_steps(method, records, tokenizer, steps), strict=True
    )
    return Timing(list(seconds), list(tokens), list(losses))


class InTurn(TrainerCallback):
    """After each step of a training, takes one of `bare_steps`; ends it at a limit.

    Attributes:
        own, others: seconds of the training's steps and of the others.
        other_tokens, other_loss: real tokens and losses of the others.
    """

    def __init__(self, steps: Iterator[tuple], limit_s: float = math.inf) -> None:
        self.steps, self.own, self.others = steps, [], []
        self.other_tokens, self.other_loss = [], []
        self.end = time.perf_counter() + limit_s

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.own.append(time.perf_counter() - self.start)
        loss, seconds, tokens = next(self.steps)
        self.others.append(seconds)
        self.other_tokens.append(tokens)
        self.other_loss.append(loss)
        late = time.perf_counter() > self.end
        control.should_training_stop = control.should_training_stop or late
        self.start = time.perf_counter()


def course(
    method, records, tokenizer, steps, folder, *, profile=None, callbacks=(), **more
) -> Timing:
    """SFTTrainer made ready by `prepare_trainer`; `more` are arguments of a trial."""
    profile = profile or get_profile()
    clock = Clock(CompletionCollator(tokenizer))
    settings = _common(method, steps, folder)
    del settings["output_dir"]
    settings |= {"per_device_train_batch_size": EXAMPLES} | more
    trainer = SFTTrainer(
        model=make_model(method, profile.dtype),
        args=sft_config(profile, folder, **settings),
        train_dataset=tokenize_dataset(records, tokenizer),
        data_collator=clock,
        processing_class=tokenizer,
        callbacks=[clock, *callbacks],
    )
    prepare_trainer(trainer, every=10**9)
    trainer.train()
    release(trainer)
    return clock.timing(trainer)


PATHS = {
    "classic": classic,
    "sft_defaults": sft_defaults,
    "litgpt": litgpt,
    "bare_loop": bare_loop,
    "course": course,
}


def train(path: str, method: str, records, tokenizer, steps: int) -> dict:
    """Train by one of `PATHS`; the fields of a run."""
    with tempfile.TemporaryDirectory() as folder:
        return PATHS[path](method, records, tokenizer, steps, folder).as_run()
