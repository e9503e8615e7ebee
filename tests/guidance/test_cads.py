"""`cads` against the port that people use, and what seeds, rows and neighbours do to it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sampler
from sampler import registry
from sampler.guidance.cads import annealed, gamma
from sampler.types import Cond
from tests import tiny
from tests.analytic import vp_grid
from tests.guidance.golden import relative

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guidance_pack" / "cads.npz")
CFG = {"name": "cfg", "scale": 2.0}
BUNDLED = "a red apple on a blue background"


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", range(5))
def test_noise_with_statistics_per_sample(case, dtype, bar):
    y, noise = (torch.as_tensor(GOLDEN[k]).to(dtype) for k in ("y", "noise"))
    found = annealed(y, noise, *GOLDEN["configs"][case].tolist())
    assert found.dtype == dtype and relative(found, GOLDEN["per_row"][case]) <= bar


def test_the_schedule():
    steps, tau1, tau2 = GOLDEN["schedule"].tolist()
    found = [gamma(1 - i / steps, tau1, tau2) for i in range(int(steps))]
    assert np.allclose(found, GOLDEN["gamma"], atol=1e-12)


def test_masked_tokens_are_left_out():
    y, noise = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0
    found = annealed(y, noise, 0.3, 0.25, 1.0, mask)
    assert torch.equal(found[0, 3:], y[0, 3:])
    assert torch.allclose(found[0, :3], annealed(y[:1, :3], noise[:1, :3], 0.3, 0.25, 1.0)[0])


def test_constant_states_are_finite():
    y, zero = torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    assert annealed(y, zero, 0.5, 0.25, 1.0).isfinite().all()


def rule(**fields):
    return registry.build(
        "guidance", {"name": "cads", "rule": {"name": "cfg", "scale": 2.0}, **fields}
    )


def states(rows):
    """Text states that differ between samples."""
    g = torch.Generator().manual_seed(3)
    y = torch.randn(rows, 4, 6, generator=g, dtype=torch.float64)
    return Cond({"encoder_hidden_states": y}, {"encoder_hidden_states": y.flip(1)})


def net(x, level, cond):
    y = cond["encoder_hidden_states"]
    return (
        torch.tanh(x) * 0.5 + y.square().mean((1, 2)).view(-1, 1, 1, 1) * 0.1 + y[:, :1, :1, None]
    )


def walk(guidance, rows=3, seeds=(5, 6, 7), method="ddim", cond=None, steps=8):
    engine = sampler.Engine(sampler.denoiser(net, "eps"))
    x = torch.ones(rows, 2, 2, 2, dtype=torch.float64)
    return engine.run(x, vp_grid(steps), cond or states(rows), method, guidance, seeds)


@pytest.mark.parametrize("fields", [{}, {"form": "uniform"}, {"branches": ["cond", "uncond"]}])
def test_an_image_depends_on_its_own_seed_alone(fields):
    together = walk(rule(**fields))
    for b in range(3):
        own = Cond(
            *({k: v[b : b + 1] for k, v in c.items()} for c in (states(3).cond, states(3).uncond))
        )
        assert torch.equal(walk(rule(**fields), 1, (5 + b,), cond=own)[0], together[b])
    assert torch.equal(walk(rule(**fields)), together)
    assert not torch.equal(walk(rule(**fields), seeds=(5, 6, 8))[2], together[2])


def test_without_noise_it_is_the_rule_itself():
    assert torch.equal(walk(rule(form="uniform", strength=0.0)), walk(CFG))
    assert not torch.equal(walk(rule()), walk(CFG))
    inner = rule()
    late = sampler.Span(7, *vp_grid(8)[7:9], 8)
    given = states(1)
    branches = inner.plan(torch.zeros(1, 2), late, given, ())
    assert branches["cond"].cond is given.cond  # γ = 1: the same tensors


def test_pooled_vectors_and_resuming():
    cond = states(2)
    cond.cond["pooled_projections"] = torch.randn(2, 6, dtype=torch.float64)
    cond.extra.update(seeds=torch.tensor([1, 2]))
    span = sampler.Span(0, *vp_grid(8)[:2], 8)
    plain = rule().plan(torch.zeros(2, 2), span, cond, ())["cond"].cond
    both = rule(pooled=True).plan(torch.zeros(2, 2), span, cond, ())["cond"].cond
    assert torch.equal(plain["pooled_projections"], cond.cond["pooled_projections"])
    assert not torch.equal(both["pooled_projections"], cond.cond["pooled_projections"])
    assert torch.equal(both["encoder_hidden_states"], plain["encoder_hidden_states"])


def test_forecasts_shift_no_noise():
    plain, policy = walk(rule(), steps=12), [1] * 8 + [0, 1, 0, 1]
    found = walk(
        rule().__class__
        and registry.build("guidance", {"name": "forecast", "rule": rule(), "policy": policy}),
        steps=12,
    )
    assert float((found - plain).norm() / plain.norm()) < 0.1


def test_in_generate_batches_agree():
    engine = sampler.load()
    run = {
        "steps": 4,
        "output": "latent",
        "guidance": {"name": "cads", "rule": {"name": "cfg", "scale": 3.0}},
    }
    eight = engine.generate(BUNDLED, n=4, seeds=1, batch_size=8, **run)
    one = engine.generate(BUNDLED, n=4, seeds=1, batch_size=1, **run)
    plain = engine.generate(
        BUNDLED, n=4, seeds=1, batch_size=8, **{**run, "guidance": {"name": "cfg", "scale": 3.0}}
    )
    assert eight.nfe == one.nfe == [8] * 4
    assert torch.allclose(one.latents, eight.latents, atol=1e-3)
    assert not torch.allclose(plain.latents, eight.latents, atol=1e-2)
    again = engine.generate(**eight.config)
    assert torch.equal(again.latents, eight.latents)


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused():
    with pytest.raises(ValueError, match="less than tau2"):
        rule(tau1=0.9, tau2=0.6)
    with pytest.raises(ValueError, match="put forecast outside"):
        registry.build("guidance", {"name": "cads", "rule": "forecast"})
    with pytest.raises(ValueError, match="encoded already"), sampler.guide(tiny.sd(), "cads"):
        pass
    with pytest.raises(ValueError, match="conditioned on classes"):
        sampler.load(tiny.dit()).generate(3, steps=4, guidance="cads")
