"""Real training steps under torch's own allocator records; run by test_memory.py.

`python memory_child.py LAYERS CASES` where CASES is a JSON list of settings. Prints one
JSON line for each case: the peak of one real step, and its start.
"""

import json
import logging
import sys
import warnings

import torch

from course_utils.memory import measure_memory


def trained_model(settings, layers):
    """The built-in model, its first `layers` layers, prepared as `settings` say."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from course_utils import models

    kind = settings["method"]
    extra = {}
    if settings.get("quantization"):
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings["quantization"],
            bnb_4bit_use_double_quant=settings["double_quant"],
            bnb_4bit_compute_dtype=torch.float32,
        )
        extra["device_map"] = {"": "cpu"}  # else a card, where there is one
    model = AutoModelForCausalLM.from_pretrained(
        models.prepare(models.SMOLLM2),
        dtype=torch.float32,
        num_hidden_layers=layers,
        **extra,
    )
    model.config.use_cache = kind == "prefix_tuning"
    makers = {
        "lora": peft.LoraConfig,
        "prompt_tuning": peft.PromptTuningConfig,
        "prefix_tuning": peft.PrefixTuningConfig,
    }
    if kind != "full":
        config = makers[kind](task_type="CAUSAL_LM", **settings["options"])
        model = peft.get_peft_model(model, config)
    model.train()
    if settings.get("gradient_checkpointing"):
        how = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        if kind != "full":
            model.enable_input_require_grads()
    return model


def measure(settings, layers):
    """Peak and start in bytes of the second training step."""
    model = trained_model(settings, layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    shape = settings["batch_size"], settings["sequence_length"]
    ids = torch.randint(10, 1000, shape)
    mask = torch.ones_like(ids)
    if settings.get("padding", True):
        mask[0, -5:] = 0

    def step():
        loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with measure_memory("allocator") as used:
        step()
    return {"peak": used.peak_bytes, "start": used.start_bytes}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    for case in json.loads(sys.argv[2]):
        print("CASE " + json.dumps(measure(case, int(sys.argv[1]))), flush=True)
