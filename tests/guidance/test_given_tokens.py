"""Tokens that LTX-2 holds at conditions, by timesteps of their own."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

import sampler
from sampler.guidance.cfg import CFG
from tests.classic.ltx2 import CALL, SEEN
from tests.classic.table import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "LTX2ConditionPipeline"
SHAPES: list = []


@dataclass(frozen=True)
class Seen(CFG):
    """CFG that notes the shapes that it sees."""

    def combine(self, x, preds, span, state):
        SHAPES.append((tuple(x.shape), {tuple(pred.out.shape) for pred in preds.values()}))
        return super().combine(x, preds, span, state)


def recipe_of(strength, name=NAME):
    condition = LTX2VideoCondition(SEEN, strength=strength, crf=0)
    return replace(TINY[name], call={**CALL, "conditions": condition})


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_another_scale_makes_the_video_of_that_scale(strength):
    recipe = recipe_of(strength)
    pipe = recipe.build(NAME)
    plain, wanted = recipe.called(pipe), recipe.called(pipe, guidance_scale=5.0)
    assert (wanted - plain).abs().max() > 1e-3
    stock = pipe.scheduler
    for scheduler in (stock, sampler.scheduler("ddim", stock)):
        pipe.scheduler = scheduler
        with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}) as calls:
            found = recipe.called(pipe)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert calls.form is not None and calls.form.scale == pytest.approx(3.0, abs=1e-3)
    pipe.scheduler = stock
    assert torch.equal(recipe.called(pipe), plain)


@pytest.mark.parametrize(("strength", "frames"), [(1.0, 2), (0.6, 3)])
def test_a_rule_sees_no_tokens_that_stay(strength, frames):
    """The first of the three latent frames of 256 tokens is the condition."""
    recipe = recipe_of(strength)
    pipe = recipe.build(NAME)
    SHAPES.clear()
    with sampler.guide(pipe, Seen(5.0)):
        recipe.called(pipe)
    assert len(SHAPES) == 3
    assert {shape[1] for x, outs in SHAPES for shape in (x, *outs)} == {frames * 256}


def hosted(strength, method):
    recipe = recipe_of(strength)
    cls_inputs = {k: v for k, v in recipe.call.items() if k != "guidance_rescale"}
    engine = sampler.load(recipe.build(NAME))
    return engine.generate(
        "a red fox", seeds=1, steps=3, height=32, width=32, sampler=method,
        guidance={"name": "cfg", "scale": 3.0}, inputs=cls_inputs, output="latent",
    ).latents[0]  # fmt: skip


def test_noise_leaves_conditions_where_they_are():
    plain, noisy = (hosted(1.0, {"name": "ddim", "eta": eta}) for eta in (0.0, 1.0))
    assert torch.equal(plain[:, 0], noisy[:, 0])
    assert (plain[:, 1:] - noisy[:, 1:]).abs().max() > 1e-2


def test_noise_beside_a_weak_condition_is_refused():
    assert hosted(0.6, "ab").isfinite().all()
    with pytest.raises(ValueError, match="A condition with a strength below 1"):
        hosted(0.6, {"name": "ddim", "eta": 1.0})


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_conditions_that_change_are_refused(strength):
    recipe = recipe_of(strength)
    pipe = recipe.build(NAME)
    convert = pipe.convert_x0_to_velocity

    def drifting(x, x0, index, scheduler=None):
        x0 = x0.clone()
        x0[:, :2] += 0.1 * index
        return convert(x, x0, index, scheduler)

    pipe.convert_x0_to_velocity = drifting
    with pytest.raises(ValueError, match="the rest is not known to be given"):
        with sampler.guide(pipe, {"name": "cfg", "scale": 3.0}):
            recipe.called(pipe)
