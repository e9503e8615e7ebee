"""Rules that leave samples or calls out, beside caches inside the network."""

import logging

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import sampler
from tests import tiny
from tests.families import FAMILIES
from tests.guidance.stock import STOCK, Rows

pytestmark = pytest.mark.filterwarnings("ignore")
CFG = {"name": "cfg", "scale": 3.0, "window": [0, 3]}
ADAPTIVE = {"name": "adaptive", "rule": CFG}


@pytest.fixture
def flux():
    pipe = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    return pipe


@pytest.mark.parametrize("rule", ["forecast", {"name": "forecast", "rule": ADAPTIVE}])
def test_forecast_is_refused(flux, rule):
    message = r"forecast: a cache is enabled on this network \(FirstBlockCacheConfig\)"
    with pytest.raises(ValueError, match=message), sampler.guide(flux, rule):
        pass
    engine = sampler.load(flux)
    with pytest.raises(ValueError, match=message):
        engine.generate("a fox", steps=8, guidance=rule, height=32, width=32)


def test_adaptive_leaves_whole_batches_out_and_says_so_once(flux, caplog):
    stock = STOCK["flux"]
    counted = Rows(flux.transformer)
    with caplog.at_level(logging.INFO, "sampler"), sampler.guide(flux, ADAPTIVE) as calls:
        stock.run(flux)
    lines = [r.message for r in caplog.records if "compact = 'batch'" in r.message]
    assert len(lines) == 1 and "FirstBlockCacheConfig" in lines[0]
    assert set(counted.rows) == {2} and sum(counted.rows) == sum(calls.nfe) < 20


def test_without_a_cache_the_rule_stays_as_it_is(caplog):
    with caplog.at_level(logging.INFO, "sampler"), sampler.guide(tiny.flux(), ADAPTIVE) as calls:
        assert calls.rule.compact == "rows"
    assert not caplog.records


@pytest.mark.parametrize("name", ["Flux", "Qwen-Image"])
def test_the_engine_beside_a_cache_makes_the_images_of_the_stock_pipeline(name):
    """Each branch is called in its own context, and nothing is kept from run to run."""
    family = FAMILIES[name]
    pipe = family.build()
    engine, rule = sampler.load(pipe), {**family_rule(pipe), "scale": 3.0}
    run = {"steps": 4, "sampler": "ddim", "guidance": rule, "output": "latent"}
    run |= {"height": 32, "width": 64, "seeds": [7, 8], "negative": "blurry"}
    prompts = list(family.prompts)
    plain = engine.generate(prompts, **run).latents
    counted = Rows(pipe.transformer)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached = engine.generate(prompts, **run)
    assert counted.rows == [2] * 8 and cached.nfe == [8, 8]
    assert not torch.equal(cached.latents, plain)  # the cache is at work
    assert torch.equal(engine.generate(prompts, **run).latents, cached.latents)
    given = {"num_inference_steps": 4, "height": 32, "width": 64, "true_cfg_scale": 3.0}
    draws = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    given |= {**family.call, "negative_prompt": ["blurry"] * 2, "output_type": "latent"}
    stock = pipe(prompt=prompts, generator=draws, **given)[0]
    assert torch.allclose(family.latents(cached.latents), stock.float(), atol=1e-5)


def family_rule(pipe):
    rule = sampler.load(pipe).pipeline.default_guidance
    return rule if rule["name"] == "cfg" else {"name": "cfg"}
