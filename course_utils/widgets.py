"""Small interactive tools, each with a static twin that draws the same figure.

`memory_planner` and `planner_figure`, `rank_slider` and `rank_figure`, `mask_viewer`
and `mask_figure`. The twin is what continuous integration and readers without widgets
see: where ipywidgets is missing, or the profile is `smoke`, the tool shows its twin.

Only what ipywidgets 7 and 8 share is used; figures are drawn by matplotlib, so that no
extension of the front end is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from course_utils import runtime
from course_utils.memory import GPUS, KNOWN_MODELS
from course_utils.widget_figures import (
    PLANNER_METHODS,
    by_name,
    mask_figure,
    plan,
    planner_figure,
    rank_errors,
    rank_figure,
)

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
