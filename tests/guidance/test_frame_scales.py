"""Guidance scales that grow along the frames of a video, inside stock and hosted pipelines."""

from dataclasses import dataclass

import pytest
import torch
from sampler_kernels import settle

import sampler
from sampler import registry
from sampler.engine.hosted import HostedEngine
from sampler.stock.forms import Given, Unsolved
from sampler.stock.solving import solve
from sampler.types import GuidanceBase
from tests.classic.table import TINY
from tests.guidance.stock_hosted import picture

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "StableVideoDiffusionPipeline"
RECIPE = TINY[NAME]
CFG = registry.build("guidance", {"name": "cfg", "scale": 3.0})


@pytest.fixture(scope="module")
def pipe():
    return RECIPE.build(NAME)


def called(pipe, rule, **more):
    with sampler.guide(pipe, rule) as calls:
        return RECIPE.called(pipe, output_type="latent", **more), calls


def test_cfg_takes_the_place_of_the_largest_scale(pipe):
    found, calls = called(pipe, {"name": "cfg", "scale": 5.0})
    assert calls.form is not None and calls.form.scale == pytest.approx(3.0, abs=1e-4)
    assert calls.form.shares == pytest.approx((0, 1 / 3, 2 / 3, 1), abs=1e-4)
    stock = RECIPE.called(pipe, output_type="latent", max_guidance_scale=5.0)
    assert (found - stock).abs().max() <= 1e-5 * stock.abs().max()
    plain = RECIPE.called(pipe, output_type="latent")
    assert (plain - stock).abs().max() > 1e-3 * stock.abs().max()


def test_falling_scales_have_their_shares_too(pipe):
    own = {"min_guidance_scale": 4.0, "max_guidance_scale": 1.5}
    found, calls = called(pipe, {"name": "cfg", "scale": 4.0}, **own)
    assert calls.form is not None and calls.form.shares[0] == pytest.approx(1)
    stock = RECIPE.called(pipe, output_type="latent", **own)
    assert (found - stock).abs().max() <= 1e-5 * stock.abs().max()


@dataclass(frozen=True)
class Sees(GuidanceBase):
    """CFG that keeps the differences of the branches that it is given."""

    seen: list[torch.Tensor]
    needs = CFG.needs

    def start(self, cond):
        return CFG.start(cond)

    def plan(self, x, span, cond, state):
        return CFG.plan(x, span, cond, state)

    def combine(self, x, preds, span, state):
        self.seen.append(settle(preds["cond"].out) - settle(preds["uncond"].out))
        return CFG.combine(x, preds, span, state)


def test_a_rule_sees_the_shares_of_the_difference(pipe):
    rule, again = Sees([]), Sees([])
    called(pipe, rule, num_inference_steps=1)
    called(pipe, again, num_inference_steps=1, min_guidance_scale=3.0)
    share = torch.linspace(0, 1, 4).view(1, 4, 1, 1, 1)
    assert torch.allclose(rule.seen[0], share * again.seen[0], atol=1e-5)
    assert again.seen[0].abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_a_video_of_half_precision_keeps_the_shares():
    u, c = (torch.randn(1, 6, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    scales = torch.linspace(1, 3, 6).view(1, 6, 1, 1, 1)
    answers = torch.cat([u, c]).half()
    output = answers[:1] + scales.half() * (answers[1:] - answers[:1])
    form = solve(Given(output, u, [answers], "v"), NAME)
    assert form.shares == pytest.approx([k / 5 for k in range(6)], abs=0.01)


def test_scales_along_frames_and_something_else_are_refused():
    u, c = (torch.randn(1, 6, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    output = u + torch.linspace(1, 3, 6).view(1, 6, 1, 1, 1) * (c - u)
    output[..., 0] *= 1.01
    with pytest.raises(Unsolved, match="no sum of the 2 branches"):
        solve(Given(output, u, [torch.cat([u, c])], "v"), NAME)


def test_a_hosted_engine_guides_by_the_scale_of_the_call(pipe):
    engine = HostedEngine(pipe)
    inputs = {"image": picture(1), "num_frames": 4}
    call = {"seeds": 3, "steps": 3, "sampler": "ddim", "output": "latent", "inputs": inputs}
    found = engine.generate("", **call, height=32, width=32)
    assert found.config["guidance"]["scale"] == 3.0 and found.nfe == [6]
    stock = RECIPE.called(pipe, output_type="latent", image=picture(1))
    assert (found.latents - stock).abs().max() <= 1e-5 * stock.abs().max()
    inputs["max_guidance_scale"] = 2.0
    with pytest.raises(ValueError, match="the scale of the guidance rule"):
        engine.generate("", **call, height=32, width=32)
