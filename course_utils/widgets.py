"""Small interactive tools, each with a static twin that draws the same figure.

Where ipywidgets is missing, or the profile is `smoke`, which no one watches, a tool
shows its twin. Only what ipywidgets 7 and 8 share is used; figures are drawn by
matplotlib, so that no extension of the front end is needed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
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
    batch_size: int = 4,
    sequence_length: int = 512,
    gpu: str = "T4",
    gradient_checkpointing: bool = False,
    chunked_loss: bool = False,
) -> MemoryEstimate:
    """The estimate that the planner draws, with the dtype that the card asks for.

    A T4 computes in float16 (see `memory.t4_plan`), newer cards in bfloat16. `rank` is
    LoRA's `r` on all linear layers; prompt and prefix tuning take it as the number of
    virtual tokens.

    Raises:
        ValueError: as `estimate_memory`, and for an unknown card.

    >>> _plan("llama-2-7b", "qlora", gradient_checkpointing=True).fits("T4")
    True
    """
    gpu_gib(gpu)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "gradient_checkpointing": gradient_checkpointing,
        "loss": "chunked" if chunked_loss else "logits",
    }
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

    A plan that cannot be is drawn as its reason, in words.

    Args:
        model: a name in `memory.KNOWN_MODELS`.
        method: one of `PLANNER_METHODS`.
        gpu: a name in `memory.GPUS`.
        **settings: `rank` (or virtual tokens), `batch_size`, `sequence_length` in
            tokens, `gradient_checkpointing` and `chunked_loss`.
    """
    from course_utils import plotting

    try:
        estimate = _plan(model, method, gpu=gpu, **settings)
    except ValueError as error:
        ax = plotting.new_axes()
        ax.axis("off")
        ax.text(0, 0.5, textwrap.fill(f"No such plan: {error}.", 84), fontsize=9)
        return ax
    return plotting.plot_memory(
        {part: estimate.parts.get(part, 0) for part in PARTS},
        limit=gpu_gib(gpu) * GIB,
        limit_name=gpu,
        title=textwrap.fill(estimate.verdict(gpu), 84),
    )


def _rank_errors(weight: Any) -> tuple[Any, tuple[int, int]]:
    """How far the best approximation of each rank is from a matrix (m, n).

    Returns:
        Relative Frobenius errors, entry `r` for rank `r` (entry 0 is 1.0), and (m, n).
        By Eckart and Young the best rank-r error is the root of the squared singular
        values left out.

    Raises:
        ValueError: the weight is not a matrix.

    >>> errors, shape = _rank_errors([[3.0, 0.0], [0.0, 4.0]])
    >>> [round(float(error), 2) for error in errors], shape
    ([1.0, 0.6, 0.0], (2, 2))
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
    """Draw what rank r keeps of a weight (`_rank_errors`), and what it costs.

    Raises:
        ValueError: the weight has no such rank.
    """
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


def _tool(draw: Callable[..., Axes], controls: dict[str, Any]) -> Any:
    """Controls, three in a row, above the figure that `draw(**values)` makes."""
    import ipywidgets as w
    import matplotlib.pyplot as plt

    def show(**values: Any) -> None:
        draw(**values)
        plt.show()

    row = list(controls.values())
    rows = [w.HBox(row[start : start + 3]) for start in range(0, len(row), 3)]
    return w.VBox([*rows, w.interactive_output(show, controls)])


def memory_planner(**start: Any) -> Any:
    """Plan a run: model, method, rank, batch, sequence and card; a bar and a verdict.

    Args:
        **start: first values, as for `planner_figure`, which is drawn where there are
            no widgets.
    """
    w = _widgets()
    if w is None:
        return planner_figure(**start)
    powers = [2**k for k in range(8)]
    lengths = [2**k for k in range(6, 13)]

    def choose(name: str, label: str, options: Sequence, default: Any) -> Any:
        value = start.get(name, default)
        same = [o for o in options if str(o).lower() == str(value).lower()]
        if same:
            value = same[0]
        else:  # a plan may begin with what the list lacks
            options = [*options, value]
        if isinstance(options[0], int):
            options = sorted(options)
        style = {"description_width": "80px"}
        return w.Dropdown(options=options, value=value, description=label, style=style)

    def tick(name: str, label: str) -> Any:
        value = bool(start.get(name, False))
        return w.Checkbox(value=value, description=label, indent=False)

    controls = {
        "model": choose("model", "model", list(KNOWN_MODELS), "llama-2-7b"),
        "method": choose("method", "method", PLANNER_METHODS, "qlora"),
        "gpu": choose("gpu", "card", list(GPUS), "T4"),
        "rank": choose("rank", "rank", powers, 16),
        "batch_size": choose("batch_size", "batch", powers, 4),
        "sequence_length": choose("sequence_length", "tokens", lengths, 512),
        "gradient_checkpointing": tick("gradient_checkpointing", "checkpointing"),
        "chunked_loss": tick("chunked_loss", "chunked loss"),
    }
    return _tool(planner_figure, controls)


def rank_slider(weight: Any, rank: int = 8) -> Any:
    """Slide through the ranks of a weight's best approximations, from `rank` on.

    The figure alone is drawn where there are no widgets.

    Args:
        weight: a matrix (m, n), tensor or array.
        rank: where to start.

    Raises:
        ValueError: the weight is not a matrix, or has no such rank.
    """
    errors, shape = _rank_errors(weight)
    w = _widgets()
    if w is None:
        return _rank_figure(errors, shape, rank)
    limits = {"min": 0, "max": len(errors) - 1, "continuous_update": False}
    slider = w.IntSlider(value=rank, description="rank", **limits)
    return _tool(lambda rank: _rank_figure(errors, shape, rank), {"rank": slider})
