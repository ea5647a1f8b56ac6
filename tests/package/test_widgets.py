"""Widgets and their static twins: the same figures, with and without ipywidgets."""

import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from course_utils import memory, widgets


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "cpu")
    monkeypatch.setattr(plt, "show", lambda: None)


def controls_of(tool):
    """The controls of a tool by their description."""
    found = {}
    for row in tool.children[:-1]:
        found |= {control.description: control for control in row.children}
    return found


def title():
    return plt.gcf().axes[0].get_title(loc="left").replace("\n", " ")


# --- the memory planner ----------------------------------------------------------


def test_planner_figure_shows_the_estimate_and_its_verdict():
    ax = widgets.planner_figure("llama-3.2-3b", "lora", rank=32, gpu="L4")
    expected = memory.estimate_memory(
        "llama-3.2-3b",
        "lora",
        batch_size=4,
        sequence_length=512,
        dtype="bfloat16",
        autocast="bfloat16",
        r=32,
        target_modules="all-linear",
    )
    widths = [bar.get_width() for bar in ax.patches]
    assert sum(widths) == pytest.approx(expected.total_gib)
    assert title() == expected.verdict("L4")


def test_a_t4_plan_computes_in_float16_and_a_newer_card_in_bfloat16():
    assert widgets._plan("smollm2-1.7b", "lora").request.dtype == "float16"
    newer = widgets._plan("smollm2-1.7b", "lora", gpu="A100-40")
    assert newer.request.dtype == "bfloat16"


def test_rank_means_virtual_tokens_for_prompt_tuning():
    planned = widgets._plan("smollm2-135m", "prompt_tuning", rank=20)
    assert planned.trainable == 20 * 576


@pytest.mark.parametrize("method", widgets.PLANNER_METHODS)
def test_every_method_has_a_plan_in_both_states(method):
    for checkpointing in (False, True):
        ax = widgets.planner_figure(
            "qwen2.5-1.5b", method, gradient_checkpointing=checkpointing
        )
        refused = method == "prefix_tuning" and checkpointing
        assert bool(ax.patches) is not refused
        if refused:
            assert "key/value cache" in ax.texts[0].get_text().replace("\n", " ")


def test_planner_draws_anew_when_a_control_changes(live):
    tool = widgets.memory_planner(model="llama-3.2-3b", batch_size=3)
    controls = controls_of(tool)
    assert controls["batch"].value == 3
    first = title()
    controls["card"].value = "A100-80"
    assert title() != first and "A100-80" in title()
    controls["checkpointing"].value = True
    settings = {"rank": 16, "batch_size": 3, "gradient_checkpointing": True}
    planned = widgets._plan("llama-3.2-3b", "qlora", gpu="A100-80", **settings)
    assert title() == planned.verdict("A100-80")


def test_planner_begins_with_what_its_figure_accepts(live):
    controls = controls_of(widgets.memory_planner(model="Llama-2-7B", gpu="t4"))
    assert (controls["model"].value, controls["card"].value) == ("llama-2-7b", "T4")
    assert controls_of(widgets.memory_planner(gpu=16))["card"].value == 16
    assert "16" in title()


# --- the rank slider -------------------------------------------------------------


def test_rank_errors_are_those_of_the_best_approximation():
    torch.manual_seed(0)
    weight = torch.randn(12, 7)
    errors, shape = widgets._rank_errors(weight)
    assert shape == (12, 7) and len(errors) == 8
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for rank in (1, 4):
        best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        error = (torch.norm(weight - best) / torch.norm(weight)).item()
        assert errors[rank] == pytest.approx(error, rel=1e-5)
    assert errors[0] == 1 and errors[-1] == 0


def test_rank_figure_counts_parameters(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    widgets.rank_slider(np.eye(64, 32), 4)
    assert title() == "rank 4 of 32: error 93.5 %, 384 of 2,048 parameters (18.8 %)"
    with pytest.raises(ValueError, match="rank is 0 to 32"):
        widgets.rank_slider(np.eye(64, 32), 33)
    with pytest.raises(ValueError, match="two dimensions"):
        widgets.rank_slider(np.ones(3))


def test_rank_slider_moves(live):
    tool = widgets.rank_slider(torch.eye(16), rank=2)
    assert title().startswith("rank 2 ")
    controls_of(tool)["rank"].value = 5
    assert title().startswith("rank 5 ")


# --- without widgets -------------------------------------------------------------

TOOLS = {
    "planner": lambda: widgets.memory_planner(model="smollm2-360m"),
    "rank": lambda: widgets.rank_slider(torch.eye(8), 3),
}


@pytest.mark.parametrize("why", ["smoke", "missing"])
@pytest.mark.parametrize("tool", TOOLS)
def test_the_twin_is_shown_where_widgets_are_not(tool, why, monkeypatch):
    if why == "smoke":
        monkeypatch.setenv("COURSE_PROFILE", "smoke")
    else:
        monkeypatch.setenv("COURSE_PROFILE", "cpu")
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(TOOLS[tool](), plt.Axes)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_where_widgets_are(tool, live):
    import ipywidgets

    assert isinstance(TOOLS[tool](), ipywidgets.VBox)


def test_a_card_may_be_written_in_small_letters():
    size = {"batch_size": 1, "sequence_length": 512}
    small, large = (
        widgets._plan("llama-3.2-1b", "full", gpu=gpu, **size) for gpu in ("t4", "T4")
    )
    assert small.total == large.total
