"""`noise: path`: increments of one Brownian path per sample, at any number of steps."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import sampler
from sampler import registry
from sampler.core.brownian import CELL, REACH, increment
from sampler.core.noise import Noise
from sampler.samplers.coordinates import log_snr
from tests.analytic import flow_grid, mixture, vp_grid

STOCHASTIC = [
    {"name": "ddim", "eta": 1.0},
    {"name": "euler_ancestral"},
    {"name": "dpmpp_2m_sde"},
    {"name": "dpmpp_3m_sde"},
    {"name": "res_multistep", "eta": 1.0},
    {"name": "er_sde"},
    {"name": "sa_solver"},
    {"name": "dpmpp_sde"},
    {"name": "dpmpp_2s", "eta": 1.0},
    {"name": "res_2s", "eta": 1.0},
    {"name": "cps"},
]
pytestmark = pytest.mark.filterwarnings("ignore:dpmpp_3m_sde overshoots")


def drawn(a, b, seeds=(1,), dim=3):
    like = torch.empty(len(seeds), dim, dtype=torch.float64)
    return Noise(tuple(seeds)).of_move(0, like, (a, b)) * math.sqrt(b - a)


def test_increments_of_neighbouring_intervals_add_up():
    a, b, c = (round(v / CELL) * CELL for v in (-2.7, 0.31, 3.3))
    assert torch.allclose(drawn(a, b) + drawn(b, c), drawn(a, c), atol=2e-5)
    fine = [a + (c - a) * i / 64 for i in range(65)]
    whole = sum(drawn(u, v) for u, v in zip(fine, fine[1:], strict=False))
    assert torch.allclose(whole, drawn(a, c), atol=1e-3)


@pytest.mark.parametrize("ends", [(-3.0, -2.5), (-0.01, 0.004), (-31.0, 31.0), (-math.inf, -1.0)])
def test_each_is_standard_normal(ends):
    values = Noise((11,)).of_move(0, torch.empty(1, 20000), ends)[0].numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_increments_that_do_not_overlap_are_independent():
    ends = [-math.inf, *np.linspace(-4.3, 3.1, 14).tolist()]
    rows = [
        Noise((5,)).of_move(0, torch.empty(1, 20000), pair)[0]
        for pair in zip(ends, ends[1:], strict=False)
    ]
    found = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0).abs().max()
    assert found < 5 / math.sqrt(20000)


def test_steps_shorter_than_a_cell_draw_noise_of_their_own():
    like = torch.empty(1, 8)
    short = Noise((3,)).of_move(7, like, (0.1, 0.1 + CELL / 10))
    assert torch.equal(short, Noise((3,)).draw(7, like))
    outside = Noise((3,)).of_move(7, like, (REACH + 1.0, REACH + 2.0))
    assert torch.equal(outside, Noise((3,)).draw(7, like))


def test_the_cost_is_two_draws_per_level_of_the_tree():
    nodes = []

    def draw(node):
        nodes.append(node)
        return torch.zeros(1)

    increment((-1.2345, 0.9876), draw)
    assert len(nodes) <= 2 * 20 and len(set(nodes)) == len(nodes)


def test_a_row_of_its_own_draws_the_same():
    like = torch.empty(3, 4)
    rows = Noise((7, 8, 9)).of_move(2, like, [(0.0, 0.5), None, (0.5, 0.8)])
    assert torch.equal(rows[2:], Noise((9,)).of_move(2, like[:1], (0.5, 0.8)))
    assert torch.equal(rows[1:2], Noise((8,)).draw(2, like[:1]))
    assert not torch.equal(rows[0], Noise((7,)).draw(2, like[:1])[0])


def result(spec, levels, x, seeds):
    mix = mixture(6, 5)
    kind = "eps" if levels[0].alpha else "x0"

    def out(x, level, _):
        return mix.out(x, level, kind) if level.alpha else (mix.w @ mix.mu).expand_as(x)

    return sampler.Engine(sampler.denoiser(out, kind)).run(x, levels, sampler=spec, seeds=seeds)


@pytest.mark.parametrize("spec", STOCHASTIC, ids=lambda spec: spec["name"])
def test_every_stochastic_sampler_walks_one_path_per_seed(spec):
    spec = {**spec, "noise": "path"}
    levels, x = vp_grid(7), torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    one = result(spec, levels, x, [4, 5, 6])
    assert torch.equal(one, result(spec, levels, x, [4, 5, 6]))
    assert torch.equal(one[1:2], result(spec, levels, x[1:2], [5]))
    assert not torch.allclose(one, result({**spec, "noise": "step"}, levels, x, [4, 5, 6]))
    assert not torch.allclose(one, result(spec, levels, x, [1, 2, 3]))
    assert torch.isfinite(result(spec, flow_grid(6), x, [4, 5, 6])).all()


def test_the_list_of_stochastic_samplers_is_complete():
    named = {spec["name"] for spec in STOCHASTIC} | {"flow_sde", "dance_sde"}
    fields = {
        n: registry.lookup("sampler", n).__dataclass_fields__ for n in registry.names("sampler")
    }
    kinds = {name: known["noise"].default for name, known in fields.items() if "noise" in known}
    assert named == {name for name, kind in kinds.items() if kind == "step"}


def test_runs_of_other_numbers_of_steps_are_similar():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2)).double()
    seeds = range(16)
    apart = {
        noise: (
            result({"name": "er_sde", "noise": noise}, vp_grid(20), x, seeds)
            - result({"name": "er_sde", "noise": noise}, vp_grid(40), x, seeds)
        ).norm()
        for noise in ("step", "path")
    }
    assert apart["path"] < 0.5 * apart["step"]


def test_the_noise_of_the_last_half_of_dpmpp_2s_is_that_of_the_whole_step():
    levels = vp_grid(4)
    method = sampler.build("sampler", {"name": "dpmpp_2s", "eta": 1.0, "noise": "path"})
    walked = method.levels(levels)
    x = torch.randn(1, 6, dtype=torch.float64)
    pred = sampler.Prediction.from_eps(x, x, walked[0])
    half = method.step(x, pred, sampler.Span(0, walked[0], walked[1], 6), ())
    pred = sampler.Prediction.from_eps(x, x, walked[1])
    move = method.step(x, pred, sampler.Span(1, walked[1], walked[2], 6), half.state)
    assert half.std == 0 and move.over == (log_snr(levels[0]), log_snr(levels[1]))
