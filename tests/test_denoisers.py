"""The batched denoiser's memo of stacked conditions: it never shows."""

import pytest
import torch

import sampler
from sampler.core.denoisers import BatchedDenoiser


class Recording(BatchedDenoiser):
    """Notes the stacked conditions; predicts zeros."""

    def __init__(self):
        self.seen = []

    def forward(self, x, level, cond, model):
        self.seen.append(cond)
        return x * 0

    def predict(self, x, out, level, model):
        return sampler.Prediction.from_eps(x, out, level)


SPAN = sampler.Span(0, sampler.Level(5, 0.8, 0.6), sampler.Level(0, 1.0, 0.0))


def ask(denoiser, u, c, rows=None):
    branches = {"uncond": sampler.Branch(u, rows=rows), "cond": sampler.Branch(c)}
    denoiser(torch.zeros(2, 3), SPAN, branches, [0, 0])
    return denoiser.seen[-1]


@pytest.fixture
def conds():
    return {"a": torch.zeros(2, 4), "b": None}, {"a": torch.ones(2, 4), "b": None}


def expected(u, c):
    return torch.cat([u["a"], c["a"]])


def test_equal_objects_are_stacked_once(conds):
    denoiser = Recording()
    with torch.no_grad():
        first = ask(denoiser, *conds)
        assert ask(denoiser, *conds) is first
    assert torch.equal(first["a"], expected(*conds))


def test_other_objects_order_and_contents_are_stacked_anew(conds):
    u, c = conds
    denoiser = Recording()
    with torch.no_grad():
        ask(denoiser, u, c)
        assert torch.equal(ask(denoiser, c, u)["a"], expected(c, u))
        ask(denoiser, u, c)
        u["a"] += 2  # written to, in place
        assert torch.equal(ask(denoiser, u, c)["a"], expected(u, c))
        u["a"] = torch.full((2, 4), 7.0)  # replaced, inside the same dict
        assert torch.equal(ask(denoiser, u, c)["a"], expected(u, c))
        twin = {"a": u["a"].clone() + 1, "b": None}
        assert torch.equal(ask(denoiser, twin, c)["a"], expected(twin, c))


def test_rows_that_are_left_out_are_left_out(conds):
    denoiser = Recording()
    with torch.no_grad():
        ask(denoiser, *conds)
        some = ask(denoiser, *conds, rows=torch.tensor([True, False]))
    assert torch.equal(some["a"], torch.cat([conds[0]["a"][:1], conds[1]["a"]]))


def test_gradients_reach_the_conditions_at_every_step(conds):
    u, c = conds
    c["a"].requires_grad_(True)
    denoiser = Recording()
    for _ in range(2):
        ask(denoiser, u, c)["a"].sum().backward()
    assert torch.equal(c["a"].grad, torch.full((2, 4), 2.0))


def test_tensors_of_inference_mode(conds):
    denoiser = Recording()
    with torch.inference_mode():
        u = {"a": torch.zeros(2, 4)}
        c = {"a": torch.ones(2, 4)}
        ask(denoiser, u, c)
        u["a"] += 1
        assert torch.equal(ask(denoiser, u, c)["a"], expected(u, c))
