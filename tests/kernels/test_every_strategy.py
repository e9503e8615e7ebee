"""One step of every sampler with every rule: Triton's interpreter against the reference."""

import itertools

import pytest
import torch
from sampler_kernels import use_backend

from sampler import registry
from sampler.core.solver_error import SolverError
from sampler.core.trajectory import Run
from tests.kernels.canary import both, buildable, engine, flow_levels, gap, vp_levels, watched
from tests.laws.world import FLOW_ONLY

VARIANTS = {
    "cfg rescaled": {"name": "cfg", "rescale": 0.7},
    "apg clipped": {
        "name": "apg",
        "momentum": -0.5,
        "norm_threshold": 0.5,
        "rescale": 0.4,
        "space": "eps",
    },
    "apg native": {
        "name": "apg",
        "momentum": -0.5,
        "formulation": "diffusers",
        "eta": 0.3,
        "space": "native",
    },
    "adaptive apg": {"name": "adaptive", "rule": "apg", "after": "hold", "threshold": 0.5},
}
SAMPLERS, RULES = buildable("sampler"), buildable("guidance")
# They need seeds, more steps or a network with attention; tests/guidance has them.
for composed in ("cads", "forecast", "nag"):
    RULES.pop(composed, None)
DTYPES, SIZES = (torch.float32, torch.float16), (1, 7, 1000, 4097)
EVERY = list(itertools.product(DTYPES, SIZES))
PAIRS = list(itertools.product(SAMPLERS, RULES))
STEPS, ROWS = 3, 2


def worst(monkeypatch, method, rule, dtype, size):
    """The largest difference over a few steps, each from the same snapshot."""
    flow = rule == "cfg_zero" or method in FLOW_ONLY
    grid = (flow_levels if flow else vp_levels)(STEPS)
    model, cond = engine(dtype, "velocity" if flow else "v", ROWS, rule)
    canary = watched(monkeypatch)
    shape = (ROWS, *size) if isinstance(size, tuple) else (ROWS, size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))
    method, rule = SAMPLERS[method], RULES[rule]
    if rule.name == "cfg_pp" and not method.follows_direction:
        pytest.skip("cfg_pp needs a sampler that follows the direction")
    snap, levels = model.start(x, grid, cond, method, rule)
    found = 0.0
    while snap.index < len(levels) - 1:
        right, mine = both(lambda s: model.steps(s, levels, cond, method, rule), snap)
        found = max(found, gap(right, mine))
        snap = right
    canary.check()
    return found


@pytest.mark.parametrize(("dtype", "size"), EVERY, ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_with_cfg(monkeypatch, name, dtype, size):
    """Nothing but sums and multiples: the same bits."""
    assert worst(monkeypatch, name, "cfg", dtype, size) == 0


@pytest.mark.parametrize("name", ["ddim", "res_multistep", "sa_solver"])
def test_the_sum_of_errors(monkeypatch, name):
    model, cond = engine(torch.float32, "v", ROWS, "cfg")
    canary = watched(monkeypatch)
    x = torch.randn((ROWS, 1000), generator=torch.Generator().manual_seed(1))
    first = model.start(x, vp_levels(5), cond, SAMPLERS[name], RULES["cfg"])
    run = Run(*first, cond, SAMPLERS[name], RULES["cfg"])
    errors = SolverError(run), SolverError(run)
    snap, levels, *rest = errors[0].run
    while snap.index < len(levels) - 1:
        made = both(lambda s: model.steps(s, levels, *rest), snap)
        assert gap(*made) <= 1e-6
        snap = made[0]
        for error, own in zip(errors, made, strict=True):
            error(own)
    totals = []
    for backend, error in zip(("reference", "triton"), errors, strict=True):
        with use_backend(backend):
            totals.append(torch.tensor(error.total()))
    right, mine = totals
    canary.check()
    assert gap(right, mine) <= 1e-6 and right.min() > 0


@pytest.mark.parametrize(("dtype", "size"), EVERY, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rule_with_ddim(monkeypatch, name, dtype, size):
    assert worst(monkeypatch, "ddim", name, dtype, size) <= 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_with_ddim(monkeypatch, name):
    monkeypatch.setitem(RULES, name, registry.build("guidance", VARIANTS[name]))
    assert worst(monkeypatch, "ddim", name, torch.float16, 1000) <= 1e-6


@pytest.mark.parametrize("axes", [(-1,), (2, 3), (1, 2, 3), (1,), (2,)], ids=str)
def test_apg_over_some_axes(monkeypatch, axes):
    """Trailing axes make more and shorter rows; others are left to the reference."""
    rule = {"name": "apg", "axes": axes, "norm_threshold": 0.3, "momentum": -0.5}
    monkeypatch.setitem(RULES, "axes", registry.build("guidance", rule))
    assert worst(monkeypatch, "ddim", "axes", torch.float32, (2, 3, 7)) <= 1e-6


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_pair(monkeypatch, name, rule):
    dtype, size = EVERY[PAIRS.index((name, rule)) % len(EVERY)]
    assert worst(monkeypatch, name, rule, dtype, size) <= 1e-6
