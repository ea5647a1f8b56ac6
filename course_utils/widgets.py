"""Small interactive tools, each with a static twin that draws the same figure.

Where ipywidgets is missing, or in the profile `smoke`, which no one watches, the twin
is shown. Only what ipywidgets 7 and 8 share is used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
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


def _rank_errors(weight: Any) -> tuple[Any, tuple[int, int]]:
    """Relative Frobenius error of the best approximation of each rank, and the shape.

    By Eckart and Young the best rank-r error is the root of the squared singular
    values left out, so that entry 0 is 1.0.
    """
    import numpy as np

    if hasattr(weight, "detach"):
        weight = weight.detach().float().cpu().numpy()
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 2:
        raise ValueError(f"a matrix has two dimensions, this has {weight.ndim}")
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    left_out = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return np.sqrt(left_out / left_out[0]), weight.shape


def _rank_figure(errors: Any, shape: tuple[int, int], rank: int) -> Axes:
    """Draw what rank r keeps of a weight (`_rank_errors`), and what it costs."""
    from course_utils import plotting

    m, n = shape
    if not 0 <= rank < len(errors):
        raise ValueError(f"rank is 0 to {len(errors) - 1} here, not {rank}")
    ranks = range(len(errors))
    share = [100 * r * (m + n) / (m * n) for r in ranks]
    ax = plotting.new_axes()
    look = {"linewidth": 1.4, "markersize": 4, "markevery": max(len(errors) // 8, 1)}
    ax.plot(ranks, 100 * errors, "o-", color="#0072b2", label="error", **look)
    label = "parameters, of the whole weight's"
    ax.plot(ranks, share, "s--", color="#d55e00", label=label, **look)
    ax.axvline(rank, color="black", linewidth=1, linestyle=":")
    ax.set_ylim(0, 105)
    title = (
        f"rank {rank} of {len(errors) - 1}: error {100 * errors[rank]:.1f} %, "
        f"{rank * (m + n):,} of {m * n:,} parameters ({share[rank]:.1f} %)"
    )
    return plotting.finish(ax, xlabel="rank r", ylabel="per cent", title=title)


def _widgets() -> Any:
    """The module ipywidgets, or None where it is missing or no one watches."""
    try:
        import ipywidgets
    except ImportError:
        return None
    return None if runtime.get_profile().name == "smoke" else ipywidgets


def _tool(w: Any, draw: Callable[..., Axes], controls: dict[str, Any]) -> Any:
    """Controls, three in a row, above the figure that `draw(**values)` makes."""
    import matplotlib.pyplot as plt

    def show(**values: Any) -> None:
        draw(**values)
        plt.show()

    row = list(controls.values())
    rows = [w.HBox(row[start : start + 3]) for start in range(0, len(row), 3)]
    return w.VBox([*rows, w.interactive_output(show, controls)])


def memory_planner(**start: Any) -> Any:
    """Plan a run, from `start` on, values of `planner_figure`: a bar and a verdict."""
    w = _widgets()
    if w is None:
        return planner_figure(**start)

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
        value = bool(start.get(name, False))
        return w.Checkbox(value=value, description=label, indent=False)

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
    return _tool(w, planner_figure, controls)


def rank_slider(weight: Any, rank: int = 8) -> Any:
    """Slide through the ranks of the best approximations of a matrix (m, n).

    Raises ValueError: the weight is not a matrix, or has no such rank.
    """
    errors, shape = _rank_errors(weight)
    w = _widgets()
    if w is None:
        return _rank_figure(errors, shape, rank)
    limits = {"min": 0, "max": len(errors) - 1, "continuous_update": False}
    slider = w.IntSlider(value=rank, description="rank", **limits)
    return _tool(w, lambda rank: _rank_figure(errors, shape, rank), {"rank": slider})
