"""The values of the loop: every parametrisation against its definition."""

import pytest
import torch

import sampler
from sampler.types import KINDS, Level, Prediction, spans

VP = Level(500, 0.6, 0.8)
FLOW = Level(300, 0.7, 0.3)


def pieces():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 5, 5, generator=g, dtype=torch.float64).split(1)
    return x0, eps


@pytest.mark.parametrize("level", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parametrisation_sees_the_same_prediction(kind, level):
    x0, eps = pieces()
    a, s = level.alpha, level.sigma
    x = a * x0 + s * eps
    out = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": eps - x0}
    pred = getattr(Prediction, f"from_{kind}")(x, out[kind], level)
    for view, expected in out.items():
        got = getattr(pred, view).tensor()
        assert torch.allclose(got, expected, rtol=0, atol=1e-14), view


def test_per_row_levels_give_each_row_its_own():
    x0, eps = pieces()
    rows = Level(None, torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))
    x = torch.cat([0.6 * x0 + 0.8 * eps, 0.8 * x0 + 0.6 * eps])
    pred = Prediction.from_eps(x, torch.cat([eps, eps]), rows)
    assert torch.allclose(pred.x0.tensor(), torch.cat([x0, x0]), atol=1e-6)
    v = torch.cat([0.6 * eps - 0.8 * x0, 0.8 * eps - 0.6 * x0])
    assert torch.allclose(
        Prediction.from_v(x, v, rows).eps.tensor(), torch.cat([eps] * 2), atol=1e-6
    )


def test_a_direction_apart_from_the_target():
    x0, eps = pieces()
    pred = Prediction.from_x0(x0, x0, VP, eps=eps)
    assert torch.equal(pred.eps.tensor(), eps) and torch.equal(pred.x0.tensor(), x0)
    assert torch.allclose(pred.v.tensor(), 0.6 * eps - 0.8 * x0)


def test_what_cannot_be_said_is_refused():
    x0, _ = pieces()
    with pytest.raises(ValueError, match="alpha = 0"):
        Prediction.from_eps(x0, x0, Level(999, 0.0, 1.0))
    with pytest.raises(ValueError, match="sigma = 0"):
        _ = Prediction.from_x0(x0, x0, Level(0, 1.0, 0.0)).eps
    with pytest.raises(ValueError, match="one of eps, v, x0, velocity"):
        Prediction.of("epsilon", x0, x0, VP)


def test_spans_walk_the_grid():
    walked = spans((VP, FLOW, Level(0, 1.0, 0.0)))
    assert [s.index for s in walked] == [0, 1]
    assert walked[0].next is walked[1].now


def test_public_names_are_all_there():
    for name in sampler.__all__:
        assert getattr(sampler, name).__doc__
    with pytest.raises(AttributeError, match="attribute .*nothing"):
        _ = sampler.nothing
