"""A small training that a test kills: `python training_child.py FOLDER [KILL_AT]`.

Resumes from the newest complete checkpoint in FOLDER. With KILL_AT it sends itself a
SIGKILL in the middle of that optimiser step. Prints the losses as JSON at the end.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from small_models import byte_tokenizer, random_llama
from transformers import TrainerCallback
from trl import SFTTrainer

from course_utils.formatting import CompletionCollator
from course_utils.runtime import Profile
from course_utils.training import (
    LossHistory,
    find_checkpoint,
    prepare_trainer,
    sft_config,
)

STEPS = 24


def records(count=40, seed=3):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, 259) for _ in range(draw.randrange(6, 30))]
        labels = [-100] * 4 + ids[4:]
        rows.append(
            {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        )
    return Dataset.from_list(rows)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, kill_at=None):
    """Train, or go on training, in a folder; return the losses and sums of weights."""
    torch.set_num_threads(1)
    profile = Profile("cpu", "cpu", torch.float32, 0)
    # Dropout and several epochs: the random state and the data order both matter.
    trainer = SFTTrainer(
        model=random_llama(initializer_range=0.05, attention_dropout=0.2),
        args=sft_config(
            profile,
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            save_strategy="steps",
            save_steps=3,
        ),
        train_dataset=records(),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )
    prepare_trainer(trainer)
    if kill_at:
        trainer.add_callback(Kill(kill_at))
    found = find_checkpoint(folder)
    trainer.train(resume_from_checkpoint=found)
    history = LossHistory.from_trainer(trainer)
    weights = [p.detach().double().sum().item() for p in trainer.model.parameters()]
    facts = {"from": found and Path(found).name, "loss": history.loss}
    return facts | {"steps": history.steps, "weights": weights}


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], *(int(value) for value in sys.argv[2:]))))
