"""What a run costs: tensors at the peak of a step, and the bytes a user keeps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from course_utils.memory import measure_memory


class PeakOfStep(TrainerCallback):
    """Measures the most that tensors take in the second step.

    In the first there is no optimizer state yet; in the second weights, gradients,
    state and activations are all there.

    Attributes:
        peak_bytes: of the step, once it has ended.
        seconds: what the measuring itself took.
    """

    STEP = 2

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, None
        self._meter: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.STEP - 1:
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


def saved_bytes(model: Any) -> int:
    """Bytes of the file that a method leaves: an adapter, else the trained weights."""
    if not hasattr(model, "peft_config"):
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
