"""Rules that leave samples or calls out, beside caches inside the network."""

import logging

import pytest
from diffusers import FirstBlockCacheConfig

import sampler
from tests import tiny
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
