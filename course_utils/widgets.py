"""An interactive memory planner, and the static figure that it draws.

In the profile `smoke`, which no one watches, the figure alone is shown. Only what
ipywidgets 7 and 8 share is used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from course_utils import runtime
from course_utils.memory import estimate_memory, t4_plan
from course_utils.memory.estimate import PARTS, MemoryEstimate
from course_utils.memory.formula import GIB, GPUS, KNOWN_MODELS, gpu_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANNER_METHODS = ("full", "lora", "qlora", "prompt_tuning", "prefix_tuning")


def _plan(
    model: str,
    method: str,
    *,
    rank: int = 16,
    gpu: str = "T4",
    chunked_loss: bool = False,
    **options: Any,
) -> MemoryEstimate:
    """The estimate that the planner draws, with the dtype that the card asks for.

    `rank` is LoRA's `r` on all linear layers, or the number of virtual tokens;
    `options` are for `estimate_memory`.
    """
    options = {"batch_size": 4, "sequence_length": 512} | options
    options["loss"] = "chunked" if chunked_loss else "logits"
    if method in ("lora", "qlora"):
        options |= {"r": rank, "target_modules": "all-linear"}
    elif method != "full":
        options["num_virtual_tokens"] = rank
    if str(gpu).upper() in ("T4", "P100", "V100"):  # no bfloat16 units
        return t4_plan(model, method, **options)
    dtype = "float32" if method == "full" else "bfloat16"  # what trains is float32
    return estimate_memory(model, method, dtype=dtype, autocast="bfloat16", **options)


def planner_figure(
    model: str = "llama-2-7b",
    method: str = "qlora",
    *,
    gpu: str = "T4",
    **settings: Any,
) -> Axes:
    """Draw the memory of a plan as one bar, with the verdict as its title.

    A plan that cannot be is drawn as its reason, in words. `settings` are `rank` (or
    virtual tokens), `batch_size`, `sequence_length` in tokens,
    `gradient_checkpointing` and `chunked_loss`.
    """
    from course_utils import plotting

    try:
        limit = gpu_gib(gpu) * GIB
        estimate = _plan(model, method, gpu=gpu, **settings)
    except ValueError as error:
        ax = plotting.new_axes()
        ax.axis("off")
        ax.text(0, 0.5, textwrap.fill(f"No such plan: {error}.", 84), fontsize=9)
        return ax
    parts = {part: estimate.parts.get(part, 0) for part in PARTS}
    title = textwrap.fill(estimate.verdict(gpu), 84)
    return plotting.plot_memory(parts, limit=limit, limit_name=gpu, title=title)


def memory_planner(**start: Any) -> Any:
    """Plan a run, from `start` on, values of `planner_figure`: a bar and a verdict."""
    if runtime.get_profile().name == "smoke":
        return planner_figure(**start)
    import ipywidgets as w
    import matplotlib.pyplot as plt

    def choose(name: str, label: str, options: Iterable, default: Any) -> Any:
        by_text = {str(option).lower(): option for option in options}
        value = start.get(name, default)
        value = by_text.setdefault(str(value).lower(), value)  # the list may lack it
        options = list(by_text.values())
        if isinstance(options[0], int):
            options.sort()
        style = {"description_width": "80px"}
        return w.Dropdown(options=options, value=value, description=label, style=style)

    def tick(name: str, label: str) -> Any:
        return w.Checkbox(value=bool(start.get(name)), description=label, indent=False)

    powers = [2**k for k in range(13)]
    controls = {
        "model": choose("model", "model", KNOWN_MODELS, "llama-2-7b"),
        "method": choose("method", "method", PLANNER_METHODS, "qlora"),
        "gpu": choose("gpu", "card", GPUS, "T4"),
        "rank": choose("rank", "rank", powers[:8], 16),
        "batch_size": choose("batch_size", "batch", powers[:8], 4),
        "sequence_length": choose("sequence_length", "tokens", powers[6:], 512),
        "gradient_checkpointing": tick("gradient_checkpointing", "checkpointing"),
        "chunked_loss": tick("chunked_loss", "chunked loss"),
    }

    def show(**values: Any) -> None:
        planner_figure(**values)
        plt.show()

    row = list(controls.values())
    rows = [w.HBox(row[start : start + 3]) for start in range(0, len(row), 3)]
    return w.VBox([*rows, w.interactive_output(show, controls)])
