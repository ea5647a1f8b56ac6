"""Where the seconds of one training step go, by kind of work."""

from __future__ import annotations

import time

import torch

from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.models import release
from course_utils.runtime import get_profile
from course_utils.training_speed import (
    cast_lora_inputs,
    completion_loss,
    set_attention,
    without_padding,
)
from maintenance.benchmarks import paths
from maintenance.benchmarks.training import training_data
from maintenance.benchmarks.turns import Task


def profiled(method: str) -> dict:
    """The operators of one step as the course takes it, after two steps unobserved."""
    dtype = get_profile().dtype
    records, tokenizer = training_data(3)
    model = paths.make_model(method, dtype).train()
    set_attention(model, "eager")
    cast_lora_inputs(model, dtype != torch.bfloat16)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, paths.RATES[method], fused=True)
    data, collator = tokenize_dataset(records, tokenizer), CompletionCollator(tokenizer)

    def step(number: int) -> float:
        start = time.perf_counter()
        first = number * paths.EXAMPLES
        batch = collator([data[first + i] for i in range(paths.EXAMPLES)])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = completion_loss(model, without_padding(model, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step(0)
    plain = step(1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        wall = step(2)
    release(model)
    events = {}
    for event in profile.key_averages():
        if event.self_cpu_time_total > 0 and not event.key.startswith("ProfilerStep"):
            events[event.key] = event.self_cpu_time_total / 1e6
    operators = {k: v for k, v in events.items() if k.startswith(("aten::", "bnb"))}
    measured = {"operators": operators, "wall": wall, "unobserved": plain}
    return {"seconds": wall, "measured": measured}


def profile_tasks() -> list[Task]:
    """One observed step each; observing costs time, so the shares matter."""
    return [
        Task("profile", m, lambda _, m=m: profiled(m), {"method": m}, once=True)
        for m in paths.METHODS
    ]
