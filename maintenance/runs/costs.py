"""What a recorded run costs: seconds, tensors at the peak of a step, bytes kept."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from course_utils.memory import measure_memory


class PeakOfStep(TrainerCallback):
    """Measures the most that tensors take in one step: weights, state, activations.

    Attributes:
        peak_bytes: of the step, once it has ended.
        seconds: what the measuring itself took.
    """

    def __init__(self, step: int = 2) -> None:
        """Measure in the given step; in the first there is no optimizer state yet."""
        self.step, self.seconds, self.peak_bytes = step, 0.0, None
        self._meter: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            clock = time.perf_counter()
            device = args.device.type
            kind = device if device in ("cuda", "mps") else "allocator"
            self._meter = measure_memory(kind)
            self._used = self._meter.__enter__()
            self.seconds += time.perf_counter() - clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._meter is not None:
            clock = time.perf_counter()
            self._meter.__exit__(None, None, None)
            self.peak_bytes, self._meter = self._used.peak_bytes, None
            self.seconds += time.perf_counter() - clock


class EveryStep(TrainerCallback):
    """Measures each step of a training.

    Attributes:
        steps: for each its `start_bytes`, `peak_bytes`, `reserved_bytes` (on a card,
            the most that PyTorch had taken of it), `requested_bytes` (on a card, the
            peak without what the allocator's rounding adds) and `seconds`.
    """

    def __init__(self, kind: str = "auto") -> None:
        """Measure with this kind of `memory.measure_memory`."""
        self.kind, self.steps = kind, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter = measure_memory(self.kind)
        self._used = self._meter.__enter__()
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter.__exit__(None, None, None)
        names = ("start_bytes", "peak_bytes", "reserved_bytes")
        found = {name: getattr(self._used, name) for name in names}
        if self._used.kind == "cuda":
            import torch

            peak = torch.cuda.memory_stats().get("requested_bytes.all.peak")
            found["requested_bytes"] = peak
        self.steps.append(found | {"seconds": time.perf_counter() - self._clock})


class ElapsedSeconds(TrainerCallback):
    """Seconds of a training, all sittings, in the log that its checkpoints keep."""

    def __init__(self, before_s: float = 0.0) -> None:
        """Begin after the seconds of the sittings before (`elapsed_seconds`)."""
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
    """Save an adapter without the paths of this machine; returns its bytes.

    How a prompt was initialised is in the record; the file holds what was learned.

    Args:
        model: a PEFT model.
        folder: where to.
        base: the name of the base model.
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


def saved_bytes(model: Any) -> int:
    """How large the file is that a method leaves: an adapter's, else trained weights'.

    Returns:
        Bytes.
    """
    if not hasattr(model, "peft_config"):
        return sum(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
