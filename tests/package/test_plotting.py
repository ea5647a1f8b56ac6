"""Each figure is drawn without a warning, and shows the numbers it was given."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from cells import cells

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb

from course_utils import plotting
from course_utils.plotting import line_styles
from course_utils.plotting.style import (
    METHOD_COLOURS,
    METHOD_NAMES,
    METHOD_STYLES,
    display_name,
    method_of,
)
from course_utils.plotting.tokens import LEARNED, PROMPT, _token_text, _visible

METHODS = list(METHOD_COLOURS)[:10]
SLICES = [f"slice_number_{i}" for i in range(10)]
HISTORY = SimpleNamespace(
    steps=[10, 20, 30], loss=[3.0, 2.0, 1.0], eval_steps=[10, 30], eval_loss=[2.9, 1.2]
)
PARTS = {"weights": 6e9, "optimiser": 3e9, "activations": 2e9}
CAUSAL = np.tril(np.ones((6, 6)))

DRAWINGS = {
    "loss": lambda **k: plotting.plot_loss(HISTORY, **k),
    "losses": lambda **k: plotting.plot_loss(
        {"lora": HISTORY, "full": [3.0, 2.0]},
        recorded={"lora": {"loss": [3.1, 2.0], "eval_loss": [[2, 2.5]]}},
        **k,
    ),
    "comparison": lambda **k: plotting.plot_comparison(
        {m: [0.1 * i, 0.09 * i, 0.1] for i, m in enumerate(METHODS)}, **k
    ),
    "slices": lambda **k: plotting.plot_by_slice(
        {m: dict.fromkeys(SLICES, 0.1 * i) for i, m in enumerate(METHODS)}, **k
    ),
    "spectrum": lambda **k: plotting.plot_spectrum(
        {"W": torch.arange(50, 1, -1), "update": [5.0, 1.0]}, rank=8, **k
    ),
    "memory": lambda **k: plotting.plot_memory(
        {"lora": PARTS, "full": PARTS}, limit=14 * 2**30, limit_name="T4", **k
    ),
    "scatter": lambda **k: plotting.plot_scatter(
        {m: (10**i, 0.09 * i) for i, m in enumerate(METHODS)},
        xlabel="trainable parameters",
        log=True,
        **k,
    ),
    "rates": lambda **k: plotting.plot_learning_rates(
        {"lora": {1e-4: [0.1, 0.2], 1e-3: [0.8, 0.9], 1e-2: [0.3, 0.2]}}, **k
    ),
    "mask": lambda **k: plotting.plot_mask(
        [["a", "b\n", "灯", "$x$", "pad"]],
        [[-100, 1, 2, 3, -100]],
        [[1, 1, 1, 1, 0]],
        **k,
    ),
    "compact": lambda **k: plotting.plot_mask(
        torch.ones(3, 7), torch.ones(3, 7), torch.ones(3, 7), compact=True, **k
    ),
    "attention": lambda **k: plotting.plot_attention_mask(
        CAUSAL, tokens="abcde灯", **k
    ),
    "confusion": lambda **k: plotting.plot_confusion(
        [[9, 1, 0], [3, 4, 3], [0, 0, 0]], ["bad", "mixed", "good"], **k
    ),
    "trade_off": lambda **k: plotting.plot_scatter(
        {m: (10 * i, 0.09 * i, 10**i) for i, m in enumerate(METHODS)},
        xlabel="seconds",
        **k,
    ),
}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def overlapping(labels):
    """Pairs of tick labels that cover one another, as drawn."""
    shown = [text for text in labels if text.get_text() and text.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent().shrunk(0.99, 0.9)) for t in shown]
    return [
        (a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])
    ]


def _no_warnings():
    warnings.simplefilter("error")
    # matplotlib 3.10.0, which Colab has, asks an old name of a newer pyparsing
    warnings.filterwarnings("ignore", r"'\w+' .*deprecated.* use '\w+'")


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_figure_draws_without_a_warning(name, tmp_path):
    with warnings.catch_warnings():
        _no_warnings()
        ax = DRAWINGS[name]()
        figure = ax.figure
        figure.savefig(tmp_path / "figure.png")
    assert figure.get_figwidth() == 6.0 and figure.get_figheight() <= 4.0
    assert figure.get_layout_engine() is not None
    if ax.axison:
        assert ax.get_xlabel() and not overlapping(ax.get_xticklabels())
        assert not overlapping(ax.get_yticklabels())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["memory", "mask", "compact", "scatter", "trade_off"])
def test_a_legend_below_covers_nothing(name, given):
    ax = DRAWINGS[name](ax=plt.subplots()[1] if given else None)
    ax.figure.draw_without_rendering()
    box = ax.figure.legends[0].get_window_extent()
    assert box.y0 >= 0 and box.y1 <= ax.get_tightbbox().y0
    assert box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1


def test_a_title_stands_at_the_left():
    ax = DRAWINGS["memory"](title="A title")
    assert ax.get_title(loc="left") == "A title"


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_figure_draws_in_given_axes(name):
    figure, ax = plt.subplots()
    assert DRAWINGS[name](ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_the_labels_of_a_scatter_do_not_overlap():
    points = {m: (100 + i, 0.9 + 0.004 * (i % 3)) for i, m in enumerate(METHODS)}
    ax = plotting.plot_scatter(points, xlabel="seconds")
    assert {text.get_text() for text in ax.texts} == {METHOD_NAMES[m] for m in METHODS}
    assert not overlapping(ax.texts)


def test_the_loss_lines_hold_the_numbers():
    ax = plotting.plot_loss(HISTORY)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["training"].get_xdata()) == [10, 20, 30]
    assert list(lines["training"].get_ydata()) == [3.0, 2.0, 1.0]
    [marks] = [line for line in ax.lines if list(line.get_xdata()) == [10, 30]]
    assert list(marks.get_ydata()) == [2.9, 1.2]
    ax = plotting.plot_loss([3.0, 2.0, 1.0])
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    ax = plotting.plot_loss({"lora": [2.0]}, recorded={"lora": {"loss": [3.0]}})
    live = [line for line in ax.lines if line.get_label() == "LoRA"]
    old = [line for line in ax.lines if "recorded" in str(line.get_label())]
    assert live[0].get_alpha() is None and old[0].get_alpha() < 0.5
    assert live[0].get_color() == old[0].get_color() == METHOD_COLOURS["lora"]
    with pytest.raises(ValueError, match="no loss to draw in run 'lora'"):
        plotting.plot_loss({"lora": []})


def test_comparison_and_memory_write_their_values():
    ax = plotting.plot_comparison({"baseline": 0.12, "lora": [0.9, 0.93, 0.96]})
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["12 %", "93 % (90 to 96)"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([12, 93])
    assert ax.get_xlim() == (0, 118)
    assert plotting.plot_comparison({"full": 0.2, "lora": 0.1}).get_xlim() == (0, 25)
    assert plotting.plot_comparison({"full": 0.0}).get_xlim() == (0, 12)
    ax = plotting.plot_comparison({"full": 0.457, "lora": 1.07}, percent=False)
    assert [text.get_text() for text in ax.texts] == ["0.46", "1.07"]
    parts = {name: 2**30 * size / 1e9 for name, size in PARTS.items()}
    ax = plotting.plot_memory(parts, limit=14 * 2**30, limit_name="T4")
    assert [t.get_text() for t in ax.texts] == ["11 GiB", "T4: 14 GiB"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([6, 3, 2])
    assert [bar.get_x() for bar in ax.patches] == pytest.approx([0, 6, 9])


def test_the_cells_of_a_confusion_matrix_hold_counts_and_shares_of_the_row():
    ax = plotting.plot_confusion([[3, 1], [0, 2]], ["bad", "good"])
    texts = {tuple(text.xy): text.get_text() for text in ax.texts}
    assert texts[0, 0] == "3\n75 %" and texts[1, 0] == "1\n25 %"
    assert texts[0, 1] == "0\n0 %" and texts[1, 1] == "2\n100 %"
    with pytest.raises(ValueError, match="2 names for a matrix"):
        plotting.plot_confusion([[1]], ["bad", "good"])


def test_the_best_learning_rate_is_ringed():
    losses = {"lora": {1e-4: 0.5, 1e-3: 0.9}}
    ax = plotting.plot_learning_rates(losses)
    [ring] = [line for line in ax.lines if line.get_markersize() == 12]
    assert list(ring.get_xdata()) == [1e-4]


RATES = {m: {1e-4 * 3**i: 0.5 + abs(i - 2) for i in range(5)} for m in METHODS}


def test_panels_of_rates_stand_apart_where_nothing_is_off_the_scale(tmp_path):
    rates = {0.1 * 3**k: 0.5 for k in range(3)}
    with warnings.catch_warnings():
        _no_warnings()
        panels = plotting.plot_rate_panels({f"run {k}": rates for k in range(11)})
        panels[0].figure.savefig(tmp_path / "figure.png")
    boxes = [panel.get_tightbbox() for panel in panels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_panels_of_rates_ring_the_best_and_cross_what_is_off_the_scale(tmp_path):
    losses = RATES | {"lora": {1e-3: 0.7, 1e-2: 0.5, 1e-1: None, 1.0: 40.0}}
    with warnings.catch_warnings():
        _no_warnings()
        panels = plotting.plot_rate_panels(losses, own={"lora": (1e-3, 0.9)})
        figure = panels[0].figure
        figure.savefig(tmp_path / "figure.png")
    assert figure.get_figwidth() == 6.0 and figure.get_figheight() <= 4.0
    assert figure._suptitle.get_text() == "(red: yours)"
    assert len(panels) == len(figure.axes) == len(METHODS)
    panel = panels[METHODS.index("lora")]
    curve, over, ring, own = panel.lines
    assert list(curve.get_ydata()[:2]) == [0.7, 0.5]
    assert np.isnan(curve.get_ydata()[2:]).all()
    assert list(over.get_xdata()) == [1e-1, 1.0]
    assert set(over.get_ydata()) == {panel.get_ylim()[1]} == {1.5}
    assert (ring.get_xdata(), ring.get_ydata()) == ([1e-2], [0.5])
    assert (own.get_xdata(), own.get_ydata()) == ([1e-3], [0.9])
    assert own.get_markeredgecolor() not in METHOD_COLOURS.values()
    assert own.get_markerfacecolor() == "none"
    assert own.get_marker() == METHOD_STYLES["lora"]["marker"]
    assert panel.get_title() == "LoRA\nbest 0.01"
    assert not overlapping(panel.get_xticklabels())
    (lost,) = plotting.plot_rate_panels({"full": {1e-3: None}})
    assert lost.get_title().endswith("no loss is a number")
    for nothing in ({}, {"full": {}}):
        with pytest.raises(ValueError, match="there is no method"):
            plotting.plot_rate_panels(nothing)


def test_a_trade_off_fills_what_nothing_beats_in_all_three():
    points = {
        "lora": (10, 0.5, 1e7),
        "dora": (12, 0.5, 1e7),
        "prompt": (11, 0.4, 1e4),
        "full": (20, 0.6, 5e8),
    }
    ax = plotting.plot_scatter(points, xlabel="seconds")
    dots = {ln.get_xdata()[0]: ln for ln in ax.lines[1:] if len(ln.get_xdata())}
    hollow = {x for x, ln in dots.items() if ln.get_markerfacecolor() == "white"}
    assert hollow == {12}
    sizes = [dots[x].get_markersize() for x in (11, 10, 20)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert list(ax.lines[0].get_xdata()) == [10, 20]
    assert not overlapping(ax.texts)


def test_the_front_is_what_no_other_point_beats():
    points = {"a": (1, 0.5), "b": (2, 0.4), "c": (3, 0.9), "d": (3, 0.8), "e": (9, 0.9)}
    assert plotting.pareto_front(points) == ["a", "c"]
    with pytest.raises(ValueError, match="logarithmic"):
        plotting.plot_scatter({"a": (0, 1)}, xlabel="cost", log=True)


def test_the_front_of_lesson_8_is_that_of_the_package():
    front = cells("08_choosing_a_method", "front", definitions=True).pareto_front
    draws = np.random.default_rng(0)
    for count in (0, 1, 5, 30):  # few values, so that costs and scores tie
        pairs = draws.integers(0, 9, (count, 2)).tolist()
        points = {str(i): tuple(pair) for i, pair in enumerate(pairs)}
        assert front(points) == plotting.pareto_front(points)


def test_spectrum_and_energy():
    ax = plotting.plot_spectrum({"W": [1.0, 3.0, 2.0]})
    assert list(ax.lines[0].get_ydata()) == [3.0, 2.0, 1.0]
    ax = plotting.plot_spectrum({"W": [1.0, 3.0, 2.0]}, energy=True)
    wanted = [900 / 14, 1300 / 14, 100]
    assert list(ax.lines[0].get_ydata()) == pytest.approx(wanted)


def test_mask_cells_have_the_colour_of_what_is_learned():
    ax = plotting.plot_mask(["a", "b", "c", "d"], [-100, -100, 7, 8])
    colours = [to_hex(patch.get_facecolor()) for patch in ax.patches]
    assert colours == [PROMPT, PROMPT, LEARNED, LEARNED]
    ax = plotting.plot_mask(["a", "p", "p"], [1, -100, -100], [1, 0, 0])
    assert [text.get_text() for text in ax.texts] == ["a", "p × 2"]
    assert [patch.get_hatch() for patch in ax.patches] == [None, "////"]
    with pytest.raises(ValueError, match="labels has lengths"):
        plotting.plot_mask([1, 2, 3], [1, 2])
    many = plotting.plot_mask([f"token{i}" for i in range(200)], [1] * 200)
    assert len(many.texts) == 200 and many.figure.get_figheight() > 3


def test_a_very_long_token_stays_on_its_line():
    ax = plotting.plot_mask(["x" * 500, "y"], [1, 1])
    assert all(patch.get_x() + patch.get_width() <= 88 for patch in ax.patches)


def test_token_texts_are_drawable():
    assert _visible(" a\n") == "␣a↵"
    assert _visible("\x00\ue000") == "\\x00\\ue000"

    class Tokenizer:
        texts = {1: (" on", "Ġon"), 2: ("\ufffd", "æĪ"), 3: ("on", "▁on")}
        texts[4] = ("\ufffd", "<0xE6>")

        def decode(self, ids, **options):
            return self.texts[ids[0]][0]

        def convert_ids_to_tokens(self, token):
            return self.texts[token][1]

    texts = [_token_text(token, Tokenizer()) for token in (1, 2, 3, 4)]
    assert texts == ["␣on", "\\xe6\\x88", "␣on", "<0xE6>"]
    assert [_token_text(5), _token_text(""), _token_text("a\n")] == ["5", "∅", "a↵"]


@pytest.mark.parametrize(
    "matrix",
    [
        CAUSAL,
        CAUSAL.astype(bool),
        torch.tensor(CAUSAL)[None, None].bool(),
        np.where(CAUSAL > 0, 0.0, -1e30),
        torch.where(torch.tensor(CAUSAL) > 0, 0.0, float("-inf")).to(torch.bfloat16),
    ],
)
def test_any_kind_of_attention_mask_is_read(matrix):
    ax = plotting.plot_attention_mask(matrix)
    assert np.array_equal(np.asarray(ax.images[0].get_array()), CAUSAL > 0)


@pytest.mark.parametrize("matrix", [[[1]], np.ones((1, 1, 1, 1))])
def test_a_mask_of_one_token_is_drawn(matrix):
    assert plotting.plot_attention_mask(matrix).images[0].get_array().shape == (1, 1)


def test_an_attention_mask_must_be_square():
    with pytest.raises(ValueError, match=r"\(T, T\)"):
        plotting.plot_attention_mask(np.ones((2, 3)))


def test_each_method_has_a_look_of_its_own():
    assert METHOD_COLOURS.keys() == METHOD_STYLES.keys() == METHOD_NAMES.keys()
    wanted = "baseline full lora pissa dora prompt p_tuning prefix qlora frozen"
    assert set(wanted.split()) <= METHOD_COLOURS.keys()
    for column in ("linestyle", "marker"):
        values = [str(style[column]) for style in METHOD_STYLES.values()]
        same = len(values) - len(set(values))
        assert same <= 1  # `full` and `lora` share the solid line, not the marker
    # colours stay apart, also for the two common kinds of colour blindness
    # (Vienot, Brettel and Mollon 1999, on linear light)
    for blind in (np.eye(3), PROTAN, DEUTAN):
        lights = [blind @ (np.array(to_rgb(c)) ** 2.2) for c in METHOD_COLOURS.values()]
        screen = [np.clip(light, 0, 1) ** (1 / 2.2) for light in lights]
        apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(screen, 2)]
        assert min(apart) > 0.1


RGB_TO_LMS = np.array(
    [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.03, 0.18431, 1.46709]]
)
PROTAN = (
    np.linalg.inv(RGB_TO_LMS)
    @ np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    @ RGB_TO_LMS
)
DEUTAN = (
    np.linalg.inv(RGB_TO_LMS)
    @ np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    @ RGB_TO_LMS
)


def test_a_method_keeps_its_colour_under_every_name():
    names = ["lora", "LoRA r = 8", "lora r=64", "prefix_tuning", "P-tuning", "run 1"]
    styles = line_styles(names)
    assert styles["lora"]["color"] == styles["LoRA r = 8"]["color"]
    looks = {str(style) for style in styles.values()}
    assert len(looks) == len(names)
    assert styles["prefix_tuning"]["color"] == METHOD_COLOURS["prefix"]
    assert styles["P-tuning"]["color"] == METHOD_COLOURS["p_tuning"]
    methods = {METHOD_COLOURS[m] for m in ("lora", "p_tuning")}
    assert styles["run 1"]["color"] not in methods
    assert method_of("loran") is None
    for method in METHOD_COLOURS:  # each of many runs of one method looks another way
        runs = line_styles([f"{method} {i}" for i in range(6)]).values()
        for part in ("linestyle", "marker"):
            assert len({str(style[part]) for style in runs}) == 6, method


def test_importing_needs_neither_matplotlib_nor_a_display():
    code = (
        "import io, sys, course_utils.plotting as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.plot_loss([1.0, 0.5]).figure.savefig(io.BytesIO())"
    )
    root = str(Path(plotting.__file__).parents[1])
    environment = {"MPLBACKEND": "", "DISPLAY": "", "PATH": "", "PYTHONPATH": root}
    if sys.platform == "win32":  # it has a display, and needs its own variables
        environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_rslora_is_not_called_lora():
    names = [display_name(key) for key in ("lora", "rslora")]
    assert names == ["LoRA", "rsLoRA"]


def test_a_run_that_broke_leaves_a_gap_among_learning_rates():
    scores = {"prompt": {1.0: 1.2, 3.0: None, 0.3: float("nan"), 0.1: [2.0, 2.2]}}
    ax = plotting.plot_learning_rates(scores)
    assert ax.lines[-1].get_xdata()[0] == 1.0  # the ring
    broken = plotting.plot_learning_rates({"prompt": {1.0: None}})
    assert len(broken.lines) == 1
