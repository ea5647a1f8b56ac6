"""What lesson 9 builds of AdaLoRA: the update, importance, the budget, the choice."""

from types import SimpleNamespace

import torch
from cells import cells
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator

lesson = cells(
    "09_other_adapters",
    *("imports", "adalora-update", "adalora-importance", "adalora-budget"),
    definitions=True,
)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(2, 30), st.integers(1, 40))
def test_the_budget_is_pefts_and_never_rises(tinit, tfinal, between, last):
    schedule = {"tinit": tinit, "tfinal": tfinal}
    schedule["total_step"] = tinit + between + tfinal
    allocator = object.__new__(RankAllocator)
    allocator.peft_config = SimpleNamespace(deltaT=1, **schedule)
    allocator.init_bgt, allocator.target_bgt = 3 * last, last
    steps = range(1, schedule["total_step"] + 1)
    budgets = [lesson.budget(step, 3 * last, last, **schedule) for step in steps]
    assert budgets == [allocator.budget_schedule(step)[0] for step in steps]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[tinit - 1] == 3 * last > budgets[tinit]
    assert budgets[tinit + between - 1] == last


@given(st.integers(1, 11), st.integers(0, 99))
def test_the_best_of_all_layers_together_stay(budget, seed):
    torch.manual_seed(seed)
    scores = {"one": torch.rand(8), "two": 3 * torch.rand(4)}
    stay = lesson.keep_best(scores, budget)
    assert sum(int(mask.sum()) for mask in stay.values()) == budget
    kept = torch.cat([scores[name][stay[name]] for name in scores])
    gone = torch.cat([scores[name][~stay[name]] for name in scores])
    assert kept.min() > gone.max()


def test_a_triplet_whose_value_is_0_is_gone_and_no_other():
    torch.manual_seed(0)
    P, values, Q = torch.randn(6, 3), torch.randn(3, 1), torch.randn(3, 5)
    whole = lesson.svd_update(P, values, Q, 2.0)
    one = 2.0 * values[1] * torch.outer(P[:, 1], Q[1])
    values[1] = 0
    assert torch.allclose(lesson.svd_update(P, values, Q, 2.0), whole - one, atol=1e-5)
    assert not torch.allclose(lesson.svd_update(P, values, Q, 2.0), whole, atol=1e-2)


def test_importance_is_smoothed_sensitivity_and_its_unrest():
    w = torch.tensor([2.0, -3.0], requires_grad=True)
    (w**2).sum().backward()  # the gradient is 2 w
    mean, unrest = lesson.observe(0.0, 0.0, w)
    assert torch.allclose(mean, 0.15 * torch.tensor([8.0, 18.0]))
    assert torch.allclose(unrest, 0.15 * 0.85 * torch.tensor([8.0, 18.0]))
    again, _ = lesson.observe(mean, unrest, w)
    assert torch.allclose(again, (1 - 0.85**2) * torch.tensor([8.0, 18.0]))


def test_a_triplets_score_has_a_share_of_each_of_its_three_parts():
    P, values, Q = torch.zeros(4, 2), torch.zeros(2, 1), torch.zeros(2, 5)
    P[0, 0], values[1, 0], Q[1, 2] = 4.0, 7.0, 10.0
    assert lesson.triplet_scores(P, values, Q).tolist() == [1.0, 9.0]
