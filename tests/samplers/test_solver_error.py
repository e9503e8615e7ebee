"""`Result.solver_error`: its equation, its size beside the true error, its independence of rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import sampler
from sampler import registry
from sampler.core.solver_error import SolverError, has_estimate
from sampler.core.trajectory import Run
from sampler.types import Cond, Level, SamplerBase
from tests.analytic import flow_grid, mixture, vp_grid

WITH = {
    "ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_multistep",
    "deis", "unipc", "sa_solver",
}  # fmt: skip
SPECS = [
    *sorted(WITH),
    {"name": "ddim", "eta": 0.5},
    {"name": "dpmpp_2m", "clock": "sigma"},
    {"name": "res_multistep", "order": 3, "eta": 1.0},
    {"name": "deis", "order": 3},
    {"name": "sa_solver", "pece": True},
]


def noise(rows, dim=6, seed=1):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).double()


def out(mix, x, level, kind):
    """A network's output; without signal x0 is the mean of the mixture."""
    return mix.out(x, level, kind) if level.alpha else (mix.w @ mix.mu).expand_as(x)


def estimated(spec, levels, x, seeds=None, mix=None) -> tuple[torch.Tensor, Any]:
    """(result, estimate per row or None) of a run over a mixture."""
    mix = mixture(6, 5) if mix is None else mix
    kind = "eps" if levels[0].alpha else "x0"
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: out(mix, x, level, kind), kind))
    method = sampler.build("sampler", spec)
    first, grid = engine.start(x, levels, sampler=method, seeds=seeds)
    run = Run(first, grid, Cond(), method, engine.guidance)
    if not has_estimate(run):
        return engine.run_to_end(*run)[0], None
    error = SolverError(run)
    return engine.run_to_end(*error.run, on_step=error)[0], error.total()


def exact_target(places, values, H):
    """sum_j w_j·D_j, with the weights of the exact kernel by quadrature."""
    kernel = quad(lambda s: math.exp(H * s), 0, 1)[0]
    M = [quad(lambda s, m=m: math.exp(H * s) * s**m, 0, 1)[0] / kernel for m in range(len(places))]
    w = torch.as_tensor(np.linalg.solve(np.vander(places, increasing=True).T, M))
    return torch.einsum("k,kbd->bd", w, values)


@pytest.mark.parametrize(("spec", "order"), [("ddim", 1), ("res_multistep", 2)])
def test_it_is_the_sum_of_the_differences_to_the_next_order(spec, order):
    mix, levels, x = mixture(6, 5), vp_grid(7), noise(3)
    _, found = estimated(spec, levels, x)
    known, total = [], np.zeros(3)
    for now, after in zip(levels[:-2], levels[1:-1], strict=True):
        u, end = (math.log(level.alpha / level.sigma) for level in (now, after))
        known = [(u, mix.out(x, now, "x0")), *known][: order + 1]
        nodes, c = [(v - u) / (end - u) for v, _ in known], after.sigma / now.sigma
        gain = after.alpha - c * now.alpha

        values = torch.stack([D for _, D in known])
        e = {n: exact_target(nodes[:n], values[:n], end - u) for n in range(1, len(known) + 1)}
        if len(known) > order:
            gap = gain * (e[order + 1] - e[order])
            total += gap.norm(dim=1).numpy() / math.sqrt(6)
        x = c * x + gain * e[min(order, len(known))]
    assert found == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("spec", ["unipc", {"name": "sa_solver", "eta": 0.0}])
def test_for_predictor_correctors_it_is_corrected_minus_predicted(spec):
    mix, levels, x = mixture(6, 5), vp_grid(8), noise(2)
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: mix.out(x, level, "eps"), "eps"))
    snapshot, grid = engine.start(x, levels, sampler=spec)
    total = torch.zeros(2, dtype=torch.float64)
    for after in engine.steps(snapshot, grid, sampler=spec):
        if snapshot.index > 0 and after.sampler:
            total += (after.sampler.x - snapshot.x).norm(dim=1) / math.sqrt(6)
        snapshot = after
    assert total.min() > 0
    assert estimated(spec, levels, x)[1] == pytest.approx(total.tolist(), rel=1e-9)


def karras(steps):
    """Ratios of noise 14.6 to 0.029, rho = 7, and 0."""
    ends = (14.6 ** (1 / 7), 0.029 ** (1 / 7))
    ratios = (torch.linspace(*ends, steps, dtype=torch.float64) ** 7).tolist()
    levels = [(r, 1 / math.sqrt(1 + r * r)) for r in ratios]
    return (*(Level(r, a, r * a) for r, a in levels), Level(0, 1.0, 0.0))


def test_it_bounds_the_true_error_of_res_and_falls_with_the_steps():
    """As on other mixtures: 1.9 times the error at 6 steps, 9 times at 32, in the median."""
    ratios, sizes = [], []
    for steps in (6, 32):
        own, size = [], []
        for seed in range(8):
            mix, x = mixture(6, seed), noise(8, seed=seed)
            exact, _ = estimated("res_multistep", karras(200), x, mix=mix)
            result, found = estimated("res_multistep", karras(steps), x, mix=mix)
            true = (result - exact).norm(dim=1) / math.sqrt(6)
            own += (torch.tensor(found) / true).tolist()
            size += found
        assert np.mean(np.array(own) > 1) > 0.9
        ratios.append(np.median(own))
        sizes.append(np.median(size))
    assert 1.3 < ratios[0] < 2.5 and 2.5 < ratios[1] < 12
    assert sizes[0] > 10 * sizes[1]


@pytest.mark.filterwarnings("ignore:dpmpp_3m_sde overshoots")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_do_not_see_the_batch_and_the_result_is_that_of_the_plain_run(spec):
    levels, x = vp_grid(7), noise(3).float()
    result, found = estimated(spec, levels, x, seeds=[4, 5, 6])
    mix = mixture(6, 5)
    plain = sampler.Engine(sampler.denoiser(lambda x, level, _: mix.out(x, level, "eps"), "eps"))
    assert torch.equal(result, plain.run(x, levels, sampler=spec, seeds=[4, 5, 6]))
    assert all(math.isfinite(value) and value > 0 for value in found)
    for row in range(3):
        alone = estimated(spec, levels, x[row : row + 1], seeds=[4 + row])[1]
        assert alone == found[row : row + 1]


@pytest.mark.filterwarnings("ignore:dpmpp_3m_sde overshoots")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_finite_from_a_level_without_signal(spec):
    found = estimated(spec, flow_grid(7), noise(2))[1]
    assert all(math.isfinite(value) and value > 0 for value in found)


def test_it_is_none_where_nothing_can_be_estimated():
    named = {n: registry.lookup("sampler", n).error_term for n in registry.names("sampler")}
    assert {n for n, own in named.items() if own is not SamplerBase.error_term} == WITH
    assert estimated("heun", vp_grid(6), noise(2))[1] is None
    assert estimated({"name": "sa_solver", "corrector_order": 0}, vp_grid(6), noise(2))[1] is None
    assert [estimated("res_multistep", vp_grid(n), noise(1))[1] is None for n in (1, 2, 3, 4)] == [
        True, True, True, False,
    ]  # fmt: skip


def test_generate_returns_it_per_image():
    engine: Any = sampler.load()
    few, many = (
        engine.generate("a fox", n=3, seeds=1, steps=n, batch_size=2, output="latent")
        for n in (4, 16)
    )
    assert len(few.solver_error) == 3
    assert all(a > b > 0 for a, b in zip(few.solver_error, many.solver_error, strict=True))
    alone = engine.generate("a fox", seeds=2, steps=4, output="latent")
    assert alone.solver_error == pytest.approx(few.solver_error[1:2], rel=1e-3)
    one = engine.generate("a fox", seeds=1, steps=4, sampler="heun", output="latent")
    assert one.solver_error is None
