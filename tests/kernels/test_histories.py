"""Sums over a run's past, and an inverse problem's residual: through the same kernels."""

import math

import pytest
import torch
from sampler_kernels import leaves, settle, use_backend
from sampler_kernels.counting import count_launches

from sampler import registry
from sampler.guidance.linear_ag_coefficients import Coefficients
from sampler.samplers.operators import Inpaint
from sampler.types import Level, Prediction, Span
from tests.kernels.canary import gap, watched

STEPS = 20
FITTED = Coefficients(
    tuple(tuple(math.cos(i + t) / (t + 1) for i in range(t + 1)) for t in range(STEPS)),
    tuple(tuple(math.sin(i + t) / (t + 1) for i in range(t)) for t in range(STEPS)),
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 7, 1000, 4097])
def test_the_regression_of_linear_ag_over_a_whole_run(monkeypatch, n, dtype):
    """39 past tensors at the last step: 8 to a launch, the same bits as the reference."""
    spec = {"name": "linear_ag", "coefficients": FITTED, "policy": (1,) * STEPS, "scale": 3.0}
    rule = registry.build("guidance", spec)
    cond = tuple(draw(2, n, seed=s, dtype=dtype) for s in range(STEPS))
    uncond = tuple(draw(2, n, seed=100 + s, dtype=dtype) for s in range(STEPS - 1))
    with use_backend("reference"):
        right = settle(rule.predicted(cond, uncond))
    canary = watched(monkeypatch)
    with use_backend("triton"), count_launches() as launches:
        mine = settle(rule.predicted(cond, uncond))
    canary.check()
    assert torch.equal(mine, right)
    size = 2 * n * cond[0].element_size()
    assert {k.kernel for k in launches} == {"formula"} and len(launches) <= 7
    assert sum(k.read for k in launches) <= 39 * size + 6 * 2 * n * 4


@pytest.mark.parametrize("n", [1, 7, 1000, 4097])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_weighted_residual_of_reddiff_is_one_launch(monkeypatch, kind, dtype, n):
    """λ·w·(μ − x̂0) + the measurement's gradient, whatever the network predicts."""
    mask = (torch.arange(n) % 3 > 0).view(1, n).float()
    y = mask * draw(2, 1, 1, n, seed=3)
    method = registry.build("sampler", {"name": "reddiff", "operator": Inpaint(mask), "y": y})
    now, after = Level(500, 0.6, 0.8), Level(400, 0.8, 0.6)
    x, out = draw(2, 1, 1, n), draw(2, 1, 1, n, seed=1, dtype=dtype)
    state = method.start(x, now)[1]

    def step():
        move = method.step(x, Prediction.of(kind, x, out, now), Span(0, now, after, 9), state)
        return list(leaves(settle((move.mean, move.state))))

    with use_backend("reference"):
        right = step()
    canary = watched(monkeypatch)
    with use_backend("triton"), count_launches() as launches:
        mine = step()
    canary.check()
    assert gap(right, mine) == 0
    assert [k.kernel for k in launches] == ["formula"]
