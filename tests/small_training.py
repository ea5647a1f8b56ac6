"""Small trainers of random models, for tests that train."""

import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from small_models import byte_tokenizer, random_llama
from training_child import records
from transformers import Trainer

from course_utils.formatting import CompletionCollator
from course_utils.runtime import Profile
from course_utils.training import (
    sft_config,
    training_arguments,
)

FP32 = Profile("cpu", "cpu", torch.float32, 0)
BF16 = Profile("cpu", "cpu", torch.bfloat16, 0)


def begun(row, beginning):
    """The same record, after so many tokens that all begin with."""
    ids = [*range(50, 50 + beginning), *row["input_ids"]]
    labels = [-100] * beginning + row["labels"]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def batch(count=5, beginning=0):
    rows = [begun(row, beginning) for row in records(count)]
    return CompletionCollator(byte_tokenizer())(rows)


def build(kind, folder, model, profile=FP32, **settings):
    make = training_arguments if kind is Trainer else sft_config
    settings = {"max_steps": 4, "per_device_train_batch_size": 4} | settings
    return kind(
        model=model,
        args=make(profile, folder, **{"learning_rate": 1e-2} | settings),
        train_dataset=records(),
        eval_dataset=records(8, seed=9),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )


def wrapped(method):
    model = random_llama(initializer_range=0.05)
    configs = {
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "p-tuning": PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"
        ),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(4)
    return get_peft_model(model, configs[method]) if method in configs else model
