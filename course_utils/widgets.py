"""Small interactive tools, each with a static twin that draws the same figure.

`memory_planner` and `planner_figure`, `rank_slider` and `rank_figure`, `mask_viewer`
and `mask_figure`. The twin is what continuous integration and readers without widgets
see: where ipywidgets is missing, or the profile is `smoke`, the tool shows its twin.

Only what ipywidgets 7 and 8 share is used; figures are drawn by matplotlib, so that no
extension of the front end is needed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_utils import runtime
from course_utils.memory import estimate_memory, t4_plan
from course_utils.memory.estimate import PARTS, MemoryEstimate
from course_utils.memory.formula import GIB, GPUS, KNOWN_MODELS, gpu_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "interactive",
    "mask_figure",
    "mask_viewer",
    "memory_planner",
    "plan",
    "planner_figure",
    "rank_errors",
    "rank_figure",
    "rank_slider",
]

# --- widget_figures ---
# The static twins of the widgets: plain figures, for readers without widgets.
#
# `widgets` offers the public names.

PLANNER_METHODS = ("full", "lora", "qlora", "prompt_tuning", "prefix_tuning")


def plan(
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

    Args:
        model: a name in `memory.KNOWN_MODELS`.
        method: one of `PLANNER_METHODS`.
        rank: rank, or virtual tokens.
        batch_size: examples in one forward pass.
        sequence_length: tokens of the longest of them.
        gpu: a name in `memory.GPUS`.
        gradient_checkpointing: as in `estimate_memory`; not for prefix tuning.
        chunked_loss: `loss="chunked"` of `estimate_memory`.

    Raises:
        ValueError: as `estimate_memory`, and for an unknown card.

    >>> plan("llama-2-7b", "qlora", gradient_checkpointing=True).fits("T4")
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
    ax: Axes | None = None,
    **settings: Any,
) -> Axes:
    """Draw the memory of a plan as one bar, with the verdict as its title.

    Args:
        model, method, gpu: as in `plan`.
        ax: axes to draw in; None opens a figure.
        **settings: the other arguments of `plan`.

    Returns:
        The axes. A plan that cannot be is drawn as its reason, in words.
    """
    from course_utils import plotting

    try:
        estimate = plan(model, method, gpu=gpu, **settings)
    except ValueError as error:
        ax = plotting.new_axes(ax)
        ax.axis("off")
        ax.text(0, 0.5, _wrapped(f"No such plan: {error}."), fontsize=9)
        return ax
    parts = {name: estimate.parts.get(name, 0) for name in PARTS}
    return plotting.plot_memory(
        parts,
        limit=gpu_gib(gpu) * GIB,
        limit_name=gpu,
        ax=ax,
        title=_wrapped(estimate.verdict(gpu)),
    )


def _wrapped(text: str, width: int = 84) -> str:
    return "\n".join(textwrap.wrap(text, width))


def rank_errors(weight: Any) -> tuple[Any, tuple[int, int]]:
    """How far the best approximation of each rank is from a matrix.

    Args:
        weight: a matrix (m, n), tensor or array.

    Returns:
        Relative Frobenius errors, entry `r` for rank `r` (entry 0 is 1.0), and (m, n).
        By Eckart and Young the best rank-r error is the root of the squared singular
        values left out.

    Raises:
        ValueError: the weight is not a matrix.

    >>> errors, shape = rank_errors([[3.0, 0.0], [0.0, 4.0]])
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
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return np.sqrt(left / left[0]), weight.shape


def rank_figure(weight: Any, rank: int = 8, *, ax: Axes | None = None) -> Axes:
    """Draw what rank r keeps of a weight, and what it costs in parameters.

    Args:
        weight: a matrix (m, n), or the answer of `rank_errors` for one.
        rank: marked.
        ax: axes to draw in; None opens a figure.

    Raises:
        ValueError: the weight is not a matrix, or has no such rank.
    """
    from course_utils import plotting

    errors, (m, n) = weight if isinstance(weight, tuple) else rank_errors(weight)
    if not 0 <= rank < len(errors):
        raise ValueError(f"rank is 0 to {len(errors) - 1} here, not {rank}")
    ranks = range(len(errors))
    share = [100 * r * (m + n) / (m * n) for r in ranks]
    ax = plotting.new_axes(ax)
    every = max(len(errors) // 8, 1)
    look = {"linewidth": 1.4, "markersize": 4, "markevery": every}
    ax.plot(ranks, 100 * errors, color="#0072b2", marker="o", label="error", **look)
    ax.plot(ranks, share, color="#d55e00", linestyle="--", marker="s", **look,
            label="parameters, of the whole weight's")  # fmt: skip
    ax.axvline(rank, color="black", linewidth=1, linestyle=":")
    ax.set_ylim(0, 105)
    title = (
        f"rank {rank} of {len(errors) - 1}: error {100 * errors[rank]:.1f} %, "
        f"{rank * (m + n):,} of {m * n:,} parameters ({share[rank]:.1f} %)"
    )
    return plotting.finish(ax, xlabel="rank r", ylabel="per cent", title=title)


def mask_figure(
    examples: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
    choice: str | int | None = None,
    *,
    tokenizer: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one tokenized example: which tokens are learned, which are not.

    Args:
        examples: dicts with `input_ids`, `labels` and perhaps `attention_mask`, each
            (T,), in a list or under names (such as the templates they come from).
        choice: name or index of the one to draw; None takes the first.
        tokenizer: turns ids into text.
        ax: axes to draw in; None opens a figure.

    Raises:
        ValueError: there is no example, or none of that name.
    """
    from course_utils import plotting

    named = by_name(examples)
    name = next(iter(named)) if choice is None else str(choice)
    if name not in named:
        raise ValueError(f"no example {name!r}; there are: {', '.join(named)}")
    example = named[name]
    labels = list(example["labels"])
    learned = sum(int(label) != -100 for label in labels)
    return plotting.plot_mask(
        example["input_ids"],
        labels,
        example.get("attention_mask"),
        tokenizer=tokenizer,
        ax=ax,
        title=f"{name}: {learned} of {len(labels)} tokens are learned",
    )


def by_name(examples: Any) -> dict[str, Mapping[str, Any]]:
    """Give examples in a list their number as a name.

    Args:
        examples: a mapping or a sequence of tokenized examples.

    Raises:
        ValueError: there is none.
    """
    pairs = examples.items() if isinstance(examples, Mapping) else enumerate(examples)
    named = {str(name): example for name, example in pairs}
    if not named:
        raise ValueError("there is no example to show")
    return named


def interactive() -> bool:
    """Whether widgets make sense here: ipywidgets is there, and a person may be.

    False in the `smoke` profile, which no one watches.
    """
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        return False
    return runtime.get_profile().name != "smoke"


def _tool(draw: Callable[..., Axes], controls: dict[str, Any], columns: int) -> Any:
    """Controls above the figure that `draw(**values)` makes of them."""
    import ipywidgets as w
    import matplotlib.pyplot as plt

    def show(**values: Any) -> None:
        draw(**values)
        plt.show()

    names = list(controls)
    rows = [
        w.HBox([controls[name] for name in names[start : start + columns]])
        for start in range(0, len(names), columns)
    ]
    return w.VBox([*rows, w.interactive_output(show, controls)])


def memory_planner(**start: Any) -> Any:
    """Plan a run: model, method, rank, batch, sequence and card; a bar and a verdict.

    Args:
        **start: first values, as for `planner_figure`.

    Returns:
        A widget; the axes of `planner_figure` where `interactive()` is False.
    """
    if not interactive():
        return planner_figure(**start)
    import ipywidgets as w

    wide = {"description_width": "80px"}
    powers = [2**k for k in range(8)]
    lengths = [2**k for k in range(6, 13)]

    def choose(name: str, words: str, options: Sequence, value: Any) -> Any:
        value = start.get(name, value)
        same = [o for o in options if str(o).lower() == str(value).lower()]
        value = same[0] if same else value
        options = options if same else [*options, value]
        options = sorted(options) if isinstance(options[0], int) else options
        return w.Dropdown(options=options, value=value, description=words, style=wide)

    def tick(name: str, words: str) -> Any:
        value = bool(start.get(name, False))
        return w.Checkbox(value=value, description=words, indent=False)

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
    return _tool(planner_figure, controls, columns=3)


def rank_slider(weight: Any, rank: int = 8) -> Any:
    """Slide through the ranks of a weight's best approximations.

    Args:
        weight: a matrix (m, n), tensor or array.
        rank: where to start.

    Returns:
        A widget; the axes of `rank_figure` where `interactive()` is False.

    Raises:
        ValueError: as in `rank_figure`.
    """
    known = rank_errors(weight)
    if not interactive():
        return rank_figure(known, rank)
    import ipywidgets as w

    slider = w.IntSlider(
        value=rank,
        min=0,
        max=len(known[0]) - 1,
        description="rank",
        continuous_update=False,
    )
    return _tool(lambda rank: rank_figure(known, rank), {"rank": slider}, columns=1)


def mask_viewer(examples: Any, *, tokenizer: Any = None) -> Any:
    """Choose an example and see which of its tokens are learned.

    Args:
        examples, tokenizer: as in `mask_figure`.

    Returns:
        A widget; the axes of `mask_figure` where `interactive()` is False.

    Raises:
        ValueError: there is no example.
    """
    named = by_name(examples)
    if not interactive():
        return mask_figure(named, tokenizer=tokenizer)
    import ipywidgets as w

    chooser = w.Dropdown(options=list(named), description="example")

    def draw(choice: str) -> Axes:
        return mask_figure(named, choice, tokenizer=tokenizer)

    return _tool(draw, {"choice": chooser}, columns=1)
