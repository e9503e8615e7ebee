"""Normalized attention guidance: the formula, the three layouts, engine and stock pipelines."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

import sampler
from sampler import registry
from sampler.guidance.nag import guided
from sampler.pipelines import negative as layouts
from sampler.pipelines.layouts import LAYOUTS
from sampler.pipelines.negative import mixed
from sampler.types import Cond, Level
from tests.families import FAMILIES, SEEDS
from tests.tiny import sd, sd3

FOLDER = Path(__file__).parents[1] / "golden" / "guidance_pack"
GOLDEN, PLACES = np.load(FOLDER / "nag.npz"), np.load(FOLDER / "nag_layouts.npz")
NEGATIVE = "blurry and dark"
NAG = {"name": "nag", "negative": NEGATIVE}


def close(ours, theirs, bar=1e-9):
    theirs = torch.as_tensor(theirs)
    return (ours - theirs).norm() / theirs.norm() <= bar


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("norm", "key"), [("l1", "l1"), ("l2", "l2_early_authors")])
def test_the_formula(norm, key, dtype, bar):
    p, n = (torch.as_tensor(GOLDEN[k]).to(dtype) for k in ("positive", "negative"))
    for config, theirs in zip(GOLDEN["configs"].tolist(), GOLDEN[key], strict=True):
        assert close(guided(p, n, *config, norm=norm), theirs, bar)


def test_zero_outputs_stay_finite():
    zero, one = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    assert torch.equal(guided(zero, zero), zero) and torch.equal(guided(zero, one), zero)
    assert guided(one, zero).isfinite().all()


# The published attention layers, in networks of the names of those that have such layers.


class UNet2DConditionModel(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.block = nn.Module()
        self.block.attn2 = attention

    def forward(self, x, states):
        return self.block.attn2(x, encoder_hidden_states=states)


class FluxTransformer2DModel(nn.Module):
    def __init__(self, attention, name):
        super().__init__()
        block = nn.Module()
        block.attn = attention
        self.add_module(name, nn.ModuleList([block]))
        self.attn = [attention]

    def forward(self, hidden_states, joint, text=None):
        return self.attn[0](joint, encoder_hidden_states=text)


def published(attention, prefix):
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        if getattr(attention, name, None) is not None:
            setattr(attention, name, RMSNorm(8, eps=1e-6))  # whose variance is float32
    state = {k[len(prefix) :]: torch.as_tensor(PLACES[k]) for k in PLACES if k.startswith(prefix)}
    attention.load_state_dict(state)
    return attention.double()


def mixing(norm):
    s, tau, alpha = PLACES["settings"].tolist()
    return lambda p, n: guided(p, n, s, tau, alpha, norm)


def values(*names):
    return [torch.as_tensor(PLACES[name]).double() for name in names]


@torch.no_grad()
def test_cross_attention_as_published():
    attention = published(Attention(16, 18, heads=2, dim_head=8), "cross.")
    network = UNet2DConditionModel(attention)
    image, positive, negative = values("image", "cross_positive", "cross_negative")
    plain = network(image, positive)
    with mixed(network, mixing("l1"), negative.expand(2, -1, -1)):
        found = network(image, positive)
    assert close(found, PLACES["cross_l1"]) and torch.equal(network(image, positive), plain)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_two_streams_as_published(norm):
    options = {"added_kv_proj_dim": 16, "context_pre_only": False}
    attention = published(FluxAttention(16, 2, 8, bias=True, **options), "dual.")
    network = FluxTransformer2DModel(attention, "transformer_blocks")
    image, positive, negative = values("image", "text_positive", "text_negative")
    both = torch.cat([image, image])
    with mixed(network, mixing(norm)):
        found, text = network(image, both, torch.cat([positive, negative]))
    assert close(found[:2], PLACES[f"dual_image_{norm}"]) and torch.equal(found[:2], found[2:])
    assert close(text, PLACES["dual_text"])


@torch.no_grad()
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_one_stream_as_published(norm):
    attention = published(FluxAttention(16, 2, 8, bias=True, pre_only=True), "single.")
    network = FluxTransformer2DModel(attention, "single_transformer_blocks")
    image, positive, negative = values("image", "text_positive", "text_negative")
    rows = [torch.cat([text, image], 1) for text in (positive, negative)]
    with mixed(network, mixing(norm)):
        found = network(image, torch.cat(rows))
    assert close(found[:2, 4:], torch.as_tensor(PLACES["single_image_l1"])) == (norm == "l1")
    if norm == "l2":
        assert close(found, PLACES["single_l2"])


def served():
    """Families whose networks have a layout, with the class of the network."""
    for name, family in FAMILIES.items():
        if type(getattr(family.build(), family.network)).__name__ in LAYOUTS:
            yield name


@pytest.fixture(scope="module", params=list(served()))
def made(request):
    """(family, engine, the inner rule, images: plain, guided, guided with scale 1)."""
    family = FAMILIES[request.param]
    engine = sampler.load(family.build())
    if family.frames is not None:
        engine.pipeline.frames = family.frames
    default = engine.pipeline.default_guidance
    inner = default if default["name"] == "embedded" else "none"

    def images(rule, which=slice(None)):
        return engine.generate(
            list(family.prompts[which]),
            seeds=list(SEEDS[which]),
            steps=family.steps,
            sampler=family.sampler,
            guidance=rule,
            output="latent",
            height=family.size[0],
            width=family.size[1],
        )

    return family, engine, inner, images


def test_it_has_an_effect_in_every_family_and_none_when_off(made):
    family, engine, inner, images = made
    plain, on = images(inner), images({**NAG, "rule": inner})
    assert on.latents.isfinite().all()
    assert (on.latents - plain.latents).norm() > 1e-4 * plain.latents.norm()
    cost = LAYOUTS[type(engine.pipeline.network).__name__].rows
    assert on.nfe == [cost * n for n in plain.nfe]
    for off in ({"scale": 1}, {"alpha": 0}, {"window": [0, 0]}):
        found = images({**NAG, "rule": inner, **off})
        assert torch.equal(found.latents, plain.latents) and found.nfe == plain.nfe
    alone = images({**NAG, "rule": inner}, slice(1, 2))
    assert torch.allclose(alone.latents[0], on.latents[1], atol=1e-4)
    modules = engine.pipeline.network.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_stock_pipeline_makes_the_images_of_the_engine(made):
    family, engine, inner, images = made
    pipe = engine.pipeline.pipe
    given = {k: v for k, v in family.call.items() if k != "negative_prompt"}
    if family.scale[0]:
        given[family.scale[0]] = 1.0 - family.scale[1]
    given |= {"num_inference_steps": family.steps}
    given |= {"height": family.size[0], "width": family.size[1]}
    if family.frames is not None:
        given["num_frames"] = family.frames
    given["output_type"] = "latent" if family.latents else "pt"

    def call():
        draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        own = list(family.prompts)  # Z-Image writes to its list
        return pipe(prompt=own, **given, generator=draws)[0]

    plain = call()
    with sampler.guide(pipe, NAG) as calls:
        stock = call()
    assert (stock - plain).float().norm() > 1e-4 * plain.float().norm()
    assert torch.equal(call(), plain)
    ours = images({**NAG, "rule": inner})
    assert calls.nfe == ours.nfe
    if family.latents is not None and family.noise is None:
        assert torch.allclose(family.latents(ours.latents), stock.float(), atol=1e-5)


def test_the_runs_negative_prompt_is_the_rules_own_one():
    engine = sampler.load(sd())
    options = {"seeds": 1, "steps": 3, "output": "latent"}
    own = engine.generate("a fox", guidance=NAG, **options)
    run = engine.generate("a fox", guidance="nag", negative=NEGATIVE, **options)
    assert torch.equal(own.latents, run.latents)


@pytest.mark.parametrize("build", [sd, sd3])
def test_over_cfg_the_conditional_branch_alone_is_guided(build, monkeypatch):
    engine = sampler.load(build())
    rule = {"name": "nag", "rule": {"name": "cfg", "scale": 3.0}}
    options = {"seeds": 1, "steps": 3, "output": "latent", "negative": NEGATIVE}
    found = engine.generate("a fox", guidance=rule, **options)
    cost = LAYOUTS[type(engine.pipeline.network).__name__].rows
    assert found.nfe == [3 * (1 + cost)]
    plain = engine.generate("a fox", guidance=rule["rule"], **options)
    assert not torch.equal(found.latents, plain.latents)
    # scale 0 of cfg is the unconditional model, which no attention is guided for
    rule = {"name": "nag", "rule": {"name": "cfg", "scale": 0.0}}
    none = engine.generate("a fox", guidance=rule["rule"], **options)
    assert torch.equal(engine.generate("a fox", guidance=rule, **options).latents, none.latents)


def test_hooks_are_gone_after_an_exception(monkeypatch):
    engine = sampler.load(sd())
    monkeypatch.setattr(layouts, "_tokens", lambda out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate("a fox", guidance=NAG, seeds=1, steps=2)
    modules = list(engine.pipeline.network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    monkeypatch.undo()
    x = torch.ones(1, 1, 2, 2)
    assert nn.functional.scaled_dot_product_attention(x, x, x).shape == x.shape


def test_forecast_and_gradients_go_through_it():
    engine = sampler.load(sd())
    rule = {"name": "forecast", "rule": NAG, "policy": [1, 1, 1, 0, 1, 1]}
    found = engine.generate("a fox", guidance=rule, seeds=1, steps=6)
    assert found.nfe == [5]
    adapter = engine.pipeline
    cond = adapter.encode(["a fox"], [NEGATIVE], True, adapter.size(None, None))
    x = torch.randn(1, *adapter.latent_shape(64, 64), requires_grad=True)
    levels = adapter.grid(2, (64, 64))
    out = engine.run(x, levels, cond, "ddim", "nag", grad=True)
    assert torch.autograd.grad(out.square().sum(), x)[0].isfinite().all()


def test_the_share_of_clipped_tokens_is_told_once(caplog):
    engine = sampler.load(sd())
    with caplog.at_level(logging.DEBUG, "sampler"):
        engine.generate("a fox", guidance=NAG, seeds=1, steps=3)
    told = [r.message for r in caplog.records if "clipped" in r.message]
    assert len(told) == 1 and told[0].startswith("nag: ")


def function(x, level, cond):
    return x


def test_what_is_refused():
    engine = sampler.load(sd())
    options = {"seeds": 1, "steps": 2}
    with pytest.raises(ValueError, match="give a negative prompt for every image"):
        engine.generate("a fox", guidance="nag", **options)
    with pytest.raises(ValueError, match="is a function"):
        x = torch.ones(1, 4)
        levels = [Level(1, 0.6, 0.8), Level(0, 1.0, 0.0)]
        sampler.Engine(sampler.denoiser(function)).run(x, levels, Cond(1, 1), guidance="nag")
    with pytest.raises(ValueError, match="belongs to the rule"), sampler.guide(sd(), "nag"):
        pass
    pipe = sd()
    with sampler.guide(pipe, NAG), pytest.raises(ValueError, match="must be off"):
        pipe("a fox", guidance_scale=3.0, num_inference_steps=2)
    with (
        pytest.raises(ValueError, match="must be off"),
        sampler.guide(sd(), {**NAG, "rule": "cfg"}),
    ):
        pass
    for inner in ("nag", "forecast", "sum"):
        with pytest.raises(ValueError, match="put nag inside"):
            registry.build("guidance", {"name": "nag", "rule": inner})


def test_attention_that_is_not_torchs_is_refused_by_name():
    engine = sampler.load(sd())
    engine.pipeline.pipe.unet.set_attn_processor(Plain())
    with pytest.raises(ValueError, match=r"\(Plain\) is not torch's"):
        engine.generate("a fox", guidance=NAG, seeds=1, steps=2)


class Plain:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        return hidden_states
