"""What lesson 12 builds: mixed rows, places for adapters, combinations, routing."""

import pytest
import torch
from cells import cells
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

lesson = cells(
    "12_many_tasks",
    *("imports", "mixed-scratch", "mixed-compare", "demand-scratch"),
    *("combine-scratch", "route-scratch"),
    definitions=True,
)


def parts(count, seed=0, r=2, d_in=6, d_out=4):
    """Return `count` random adapters: scaling, A (r, d_in), B (d_out, r)."""
    torch.manual_seed(seed)
    return [
        (1.0 + i, torch.randn(r, d_in), torch.randn(d_out, r)) for i in range(count)
    ]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 9))
def test_each_row_of_a_mixed_batch_has_its_own_adapter(which, seed):
    experts, linear = parts(3, seed), nn.Linear(6, 4)
    zero = (0.0, torch.zeros(2, 6), torch.zeros(4, 2))
    scaling, A, B = zip(zero, *experts, strict=True)
    stacks = torch.stack(A), torch.stack(B), torch.tensor(scaling)
    x = torch.randn(len(which), 5, 6)
    with torch.no_grad():
        mixed = lesson.mixed_linear(linear, x, *stacks, torch.tensor(which))
        for row, (i, inputs) in enumerate(zip(which, x, strict=True)):
            alone = linear(inputs) + scaling[i] * inputs @ (B[i] @ A[i]).T
            assert torch.allclose(mixed[row], alone, atol=1e-4)


class Shelf:
    """Takes what a PEFT model takes, and notes what is there."""

    def __init__(self):
        self.there, self.active, self.most = [], None, 0

    def load_adapter(self, folder, name):
        assert name not in self.there and folder == f"folder of {name}"
        self.there.append(name)
        self.most = max(self.most, len(self.there))

    def delete_adapter(self, name):
        self.there.remove(name)

    def set_adapter(self, name):
        assert name in self.there
        self.active = name


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.integers(1, 5))
def test_adapters_on_demand_keep_the_last_used_and_never_one_too_many(asked, places):
    shelf = Shelf()
    folders = {name: f"folder of {name}" for name in "abcde"}
    on_demand, recent, reads = lesson.OnDemand(shelf, folders, places), [], 0
    for name in asked:
        reads += name not in recent[-places:]
        recent = [n for n in recent if n != name] + [name]
        assert on_demand.use(name) is shelf and shelf.active == name
        assert set(shelf.there) == set(recent[-places:])
    assert on_demand.reads == reads and shelf.most <= places


def test_cat_is_the_sum_and_linear_has_the_cross_terms_as_well():
    (u, A, B), (v, C, D) = weighted = parts(2)
    total = u * B @ A + v * D @ C
    cross = (u * v) ** 0.5 * (B @ C + D @ A)
    assert torch.allclose(lesson.cat(weighted), total, atol=1e-5)
    assert torch.allclose(lesson.linear(weighted), total + cross, atol=1e-4)
    assert lesson.apart(lesson.linear(weighted), total) > 0.1


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_takes_the_adapters_whose_directions_fit_best(top_k):
    experts, linear = parts(3), nn.Linear(6, 4)
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        first = torch.stack([lesson.first_direction(A, B) for _, A, B in experts])
        for v, (_, A, B) in zip(first, experts, strict=True):
            assert torch.isclose((B @ A @ v).norm(), torch.linalg.matrix_norm(B @ A, 2))
        y = lesson.arrow(linear, x, experts, first, top_k)
        scores = (x @ first.T).abs()
        for at in [(b, t) for b in range(2) for t in range(7)]:
            chosen = scores[at].topk(top_k).indices
            weights = scores[at][chosen].softmax(-1)
            update = sum(
                w * experts[k][0] * experts[k][2] @ experts[k][1] @ x[at]
                for w, k in zip(weights, chosen, strict=True)
            )
            assert torch.allclose(y[at] - linear(x[at]), update, atol=1e-4)
