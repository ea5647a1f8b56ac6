"""The look of every figure: one colour, line style and marker per method.

The colours are Okabe and Ito's (2008) colour-blind-safe set with four added.
Line styles and markers repeat the distinction, so a figure also reads in grey.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 6.0, 3.2  # inches

# The key of each method, its name, colour, line style and marker.
_METHODS: list[tuple[str, str, str, Any, str]] = [
    ("baseline", "prompting only", "#b3b3b3", (0, (1, 2)), "X"),
    ("full", "full fine-tuning", "#000000", "-", "s"),
    ("frozen", "partly frozen", "#7a3b00", (0, (6, 2)), "P"),
    ("lora", "LoRA", "#0072b2", "-", "o"),
    ("pissa", "PiSSA", "#d55e00", "--", "^"),
    ("dora", "DoRA", "#56b4e9", (0, (3, 1, 1, 1)), "D"),
    ("qlora", "QLoRA", "#6a3d9a", "-.", "v"),
    ("prompt", "prompt tuning", "#009e73", ":", "*"),
    ("p_tuning", "P-tuning", "#cc79a7", (0, (5, 1, 1, 1, 1, 1)), "<"),
    ("prefix", "prefix tuning", "#e69f00", (0, (8, 2, 2, 2)), ">"),
    ("ia3", "IA3", "#882255", (0, (2, 2)), "h"),
]
METHOD_NAMES = {key: name for key, name, *_ in _METHODS}
METHOD_COLOURS = {key: colour for key, _, colour, *_ in _METHODS}
METHOD_STYLES = {
    key: {"linestyle": line, "marker": marker} for key, *_, line, marker in _METHODS
}
_ALIASES = {"prompting": "baseline", "zero_shot": "baseline", "ptuning": "p_tuning"}
_ALIASES |= {"rslora": "lora", "last_6_layers": "frozen", "head_alone": "frozen"}
# For what is no method: dark and light in turn, each with its own line and marker.
_OTHERS = [
    ("#0072b2", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#009e73", ":", "^"),
    ("#cc79a7", "-.", "D"),
    ("#000000", (0, (5, 1, 1, 1)), "v"),
    ("#e69f00", (0, (8, 2)), "P"),
    ("#6a3d9a", (0, (1, 2)), "x"),
    ("#56b4e9", (0, (3, 3)), "*"),
]


def _key(text: str) -> str:
    """A label in small letters, words joined by underscores."""
    return re.sub(r"[\s\-]+", "_", text.strip().lower())


def method_of(label: str) -> str | None:
    """Find the method that a label names at its start, or None.

    >>> method_of("LoRA r = 8"), method_of("prefix_tuning"), method_of("run 2")
    ('lora', 'prefix', None)
    """
    methods = {key: key for key in METHOD_NAMES} | _ALIASES
    methods |= {_key(name): method for method, name in METHOD_NAMES.items()}
    for key in sorted(methods, key=len, reverse=True):
        if re.match(rf"{key}(?![a-z0-9])", _key(label)):
            return methods[key]
    return None


def display_name(label: str) -> str:
    """Write a method's key as readers know it.

    >>> display_name("p_tuning"), display_name("lora r=8"), display_name("run 2")
    ('P-tuning', 'LoRA r=8', 'run 2')
    """
    for name in [*METHOD_NAMES.values(), "rsLoRA"]:  # which is drawn as LoRA
        pattern = re.sub(r"[ -]", r"[\\s_-]+", name) + r"(?![a-zA-Z0-9])"
        if start := re.match(pattern, label, re.IGNORECASE):
            return name + label[start.end() :]
    return METHOD_NAMES.get(_ALIASES.get(label, label), label)


def line_styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Choose {"color", "linestyle", "marker"} of each label, ready for `Axes.plot`.

    A label that starts with a method's name gets that method's colour; a second one of
    the same method keeps the colour and takes another line style and marker.
    """
    methods = {label: method_of(label) for label in labels}
    taken = {METHOD_COLOURS[method] for method in methods.values() if method}
    others = [look for look in _OTHERS if look[0] not in taken] or _OTHERS
    styles: dict[str, dict[str, Any]] = {}
    turns: Counter[str | None] = Counter()
    for label, method in methods.items():
        looks = others
        if method:
            own = (METHOD_COLOURS[method], *METHOD_STYLES[method].values())
            looks = [own, *(look for look in _OTHERS if not set(look[1:]) & set(own))]
        colour, line, marker = looks[turns[method] % len(looks)]
        turns[method] += 1
        colour = METHOD_COLOURS.get(method, colour)
        styles[label] = {"color": colour, "linestyle": line, "marker": marker}
    return styles


def new_axes(ax: Axes | None = None, *, height: float = HEIGHT) -> Axes:
    """Give the course's style to `ax`, or to a new figure `height` inches high."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def legend_below(ax: Axes, **options: Any) -> None:
    """Put a legend of what is labelled, or of `handles`, under the figure's axes."""
    handles = options.pop("handles", None) or ax.get_legend_handles_labels()[0]
    look = {"fontsize": 8, "frameon": False, "loc": "outside lower center"}
    ax.figure.set_layout_engine("constrained")  # makes room for it
    ax.figure.legend(handles=handles, **look | options)


def finish(
    ax: Axes,
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    legend: bool | None = None,
    **options: Any,
) -> Axes:
    """Set labels, with their units, title and legend in the course's sizes.

    A `legend` of None is drawn where more than one thing is labelled; `options` are
    for `Axes.legend`.
    """
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    if title:
        ax.set_title(title, fontsize=9.5, loc="left")
    labelled = len(ax.get_legend_handles_labels()[1])
    if labelled > 1 if legend is None else legend:
        ax.legend(**{"fontsize": 8, "frameon": False, "handlelength": 3} | options)
    return ax
