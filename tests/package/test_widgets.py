"""The memory planner and its static twin: the same figure, with widgets or without."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

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


# --- without widgets -------------------------------------------------------------


def test_the_twin_is_shown_where_widgets_are_not(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    assert isinstance(widgets.memory_planner(model="smollm2-360m"), plt.Axes)


def test_a_tool_where_widgets_are(live):
    import ipywidgets

    assert isinstance(widgets.memory_planner(), ipywidgets.VBox)


def test_a_card_may_be_written_in_small_letters():
    size = {"batch_size": 1, "sequence_length": 512}
    small, large = (
        widgets._plan("llama-3.2-1b", "full", gpu=gpu, **size) for gpu in ("t4", "T4")
    )
    assert small.total == large.total
