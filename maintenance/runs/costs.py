"""What a recorded run costs, step by step and over several sittings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from course_utils.memory import measure_memory


class EveryStep(TrainerCallback):
    """Measures each step of a training, with a kind of `memory.measure_memory`."""

    def __init__(self, kind: str) -> None:
        self.kind, self.steps = kind, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter = measure_memory(self.kind)
        self._used = self._meter.__enter__()
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter.__exit__(None, None, None)
        names = ("start_bytes", "peak_bytes", "reserved_bytes")
        step = {name: getattr(self._used, name) for name in names}
        if self._used.kind == "cuda":
            peak = torch.cuda.memory_stats().get("requested_bytes.all.peak")
            step["requested_bytes"] = peak
        self.steps.append(step | {"seconds": time.perf_counter() - self._clock})


class ElapsedSeconds(TrainerCallback):
    """Seconds of a training, all sittings, in the log that its checkpoints keep."""

    def __init__(self, before_s: float = 0.0) -> None:
        self.before_s = before_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter() - self.before_s

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["elapsed_s"] = time.perf_counter() - self._clock


def elapsed_seconds(checkpoint: str | os.PathLike) -> float:
    """Seconds of training that led to a checkpoint, as `ElapsedSeconds` logged them."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return max(entry.get("elapsed_s", 0.0) for entry in state["log_history"])


def keep_adapter(model: Any, folder: Path, base: str) -> int:
    """Save a PEFT model's adapter without this machine's paths, and count its bytes.

    How a prompt was initialised is in the record; the file holds what was learned.
    """
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if "prompt_tuning_init" in config:
        config["prompt_tuning_init"] = "RANDOM"
        config["prompt_tuning_init_text"] = config["tokenizer_name_or_path"] = None
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
