"""Pipelines whose guidance formula is their own: solved right, or refused; never another image."""

import pytest
import torch

import sampler
from tests.guidance.own_formula import STEPS, Pipe, built
from tests.guidance.stock import Rows

pytestmark = pytest.mark.filterwarnings("ignore")
S = 3.0


def cfg(s):
    return lambda _, u, c, x, i: u + s * (c - u)


def kept(pipe, m):
    """m plus a part of the last m: a momentum that starts at the second step."""
    made = m + 0.3 * pipe.last
    pipe.last = m
    return made


def in_row(m, row, fn):
    return torch.stack([fn(one) if b == row else one for b, one in enumerate(m)])


def noise(m, size):
    return m + size * torch.randn(m.shape, generator=torch.Generator().manual_seed(1))


G = cfg(S)
SOLVED = {  # the formula, and the scale at which `cfg` is the same
    "plain": (G, S),
    "scale twice": (lambda p, u, c, x, i: u + S * (G(p, u, c, x, i) - u), S * S),
    "cond plus": (lambda p, u, c, x, i: c + S * (c - u), S + 1),
    "just above 1": (cfg(1.05), 1.05),
    "large": (cfg(40.0), 40.0),
    "half steps": (lambda p, u, c, x, i: (G(p, u, c, x, i) + c) / 2, (S + 1) / 2),
}
REFUSED = {
    "clamp": lambda p, u, c, x, i: G(p, u, c, x, i).clamp(-0.5, 0.5),
    "late clamp": lambda p, u, c, x, i: G(p, u, c, x, i).clamp(*((-9, 9), (-0.3, 0.3))[i > 2]),
    "clamp in one row": lambda p, u, c, x, i: in_row(
        G(p, u, c, x, i), 1, lambda m: m.clamp(-0.5, 0.5)
    ),
    "third term": lambda p, u, c, x, i: G(p, u, c, x, i) + 0.01 * x,
    "momentum": lambda p, u, c, x, i: kept(p, G(p, u, c, x, i)),
    "noise": lambda p, u, c, x, i: noise(G(p, u, c, x, i), 1e-3),
    "late noise": lambda p, u, c, x, i: noise(G(p, u, c, x, i), 1e-3 * (i > 2)),
    "factor": lambda p, u, c, x, i: 1.3 * G(p, u, c, x, i),
    "scale of each row": lambda p, u, c, x, i: (
        u + torch.tensor([2.0, 5.0])[:, None, None, None] * (c - u)
    ),
    "scale of each side": lambda p, u, c, x, i: u + torch.linspace(1, 4, 8) * (c - u),
    "factor of each channel": lambda p, u, c, x, i: (
        G(p, u, c, x, i) * torch.linspace(1, 1.1, 4)[:, None, None]
    ),
    "tanh": lambda p, u, c, x, i: G(p, u, c, x, i).tanh(),
    "rounded": lambda p, u, c, x, i: (G(p, u, c, x, i) * 100).round() / 100,
    "maximum": lambda p, u, c, x, i: torch.maximum(u, c),
    "scale below 1": cfg(0.4),
    "standard deviation": lambda p, u, c, x, i: (
        G(p, u, c, x, i)
        * (c.std((1, 2, 3), keepdim=True) / G(p, u, c, x, i).std((1, 2, 3), keepdim=True))
    ),
    "exchanged halfway": lambda p, u, c, x, i: cfg(S)(p, *((u, c), (c, u))[i > 2], x, i),
}
CALLS = ("uncond first", "cond first", "sequential")


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("name", SOLVED)
def test_sums_of_two_branches_are_solved(name, calls):
    formula, scale = SOLVED[name]
    pipe = built(formula, calls)
    plain = pipe()
    counted = Rows(pipe.unet)
    with sampler.guide(pipe, {"name": "cfg", "scale": scale}) as hook:
        guided = pipe()
        assert hook.form.scale == pytest.approx(scale, rel=1e-4)
        assert hook.nfe == [2 * STEPS] * 2 and sum(counted.rows) == 4 * STEPS
    assert (guided - plain).abs().max() <= 1e-5 * plain.abs().max()
    with sampler.guide(pipe, {"name": "cfg", "scale": scale + 1}):
        assert (pipe() - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_other_formulas_are_refused(name, calls):
    pipe = built(REFUSED[name], calls)
    before = pipe()
    with pytest.raises(ValueError, match=r"^\w+ (guides|cannot)|^sampler.guide cannot") as error:
        with sampler.guide(pipe, {"name": "cfg", "scale": S}):
            pipe()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert torch.equal(pipe(), before)


@pytest.mark.parametrize("calls", CALLS)
def test_exchanged_branches_keep_the_pipelines_direction(calls):
    """The branch that the pipeline moves towards is "cond", whatever its prompt."""
    pipe = built(lambda p, u, c, x, i: G(p, c, u, x, i), calls)
    plain = pipe()
    with sampler.guide(pipe, {"name": "cfg", "scale": S}):
        assert (pipe() - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_a_negated_output_is_the_same_guidance():
    """Networks whose clock runs backwards: weights that sum to −1."""
    pipe = built(lambda p, u, c, x, i: -G(p, u, c, x, i), "uncond first")
    plain = pipe()
    with sampler.guide(pipe, {"name": "cfg", "scale": S}) as hook:
        assert (pipe() - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert hook.form.sign == -1.0


def test_a_scale_that_moves_is_replaced_by_the_rules():
    pipe, wanted = (
        built(f, "uncond first") for f in (lambda p, u, c, x, i: u + (S + i) * (c - u), G)
    )
    with sampler.guide(pipe, {"name": "cfg", "scale": S}):
        assert torch.allclose(pipe(), wanted(), atol=1e-5)


def test_equal_branches_have_no_roles_and_are_guided_by_nothing():
    pipe = built(G, "sequential")
    pipe.evaluated = lambda x, t, cond, uncond: Pipe.evaluated(pipe, x, t, cond, cond)
    plain = pipe()
    with sampler.guide(pipe, {"name": "apg", "scale": S}) as hook:
        assert torch.allclose(pipe(), plain, atol=1e-5)
    assert not hook.form.settled
