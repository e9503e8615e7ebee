"""Steps of strategies on invented networks, and outputs whose surroundings are watched."""

import math

import torch
from sampler_kernels import leaves, triton_ops, use_backend

import sampler
from sampler import registry
from sampler.guidance.linear_ag_coefficients import Coefficients
from sampler.types import Level

MARGIN = 37  # odd, so that the outputs of a test are not even aligned


class Canary:
    """Gives every kernel output from within a larger buffer of NaN, and looks at it afterwards."""

    def __init__(self):
        self.buffers = []

    def new(self, shape, dtype, device):
        count = math.prod(shape)
        buffer = torch.full((count + 2 * MARGIN,), math.nan, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + count].view(tuple(shape))

    def new_like(self, x, dtype, count):
        return [self.new(x.shape, dtype, x.device) for _ in range(count)]

    def check(self):
        assert self.buffers, "no kernel has run"
        for buffer in self.buffers:
            edges = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
            assert edges.isnan().all(), "a kernel wrote outside its output"


def watched(monkeypatch):
    canary = Canary()
    monkeypatch.setattr(triton_ops, "new", canary.new)
    monkeypatch.setattr(triton_ops, "new_like", canary.new_like)
    return canary


def flow_levels(steps):
    sigmas = torch.linspace(0.9, 0, steps + 1, dtype=torch.float64).tolist()
    return [Level(1000 * s, 1 - s, s) for s in sigmas]


def vp_levels(steps):
    angles = torch.linspace(1.4, 0, steps + 1, dtype=torch.float64).tolist()
    return [Level(int(600 * a), math.cos(a), math.sin(a)) for a in angles]


def engine(dtype, prediction, rows, rule=None):
    """Networks that answer in `dtype`, and the conditions of the branches that a rule needs."""

    def fn(shift):
        def network(x, level, cond):
            cond = cond["guidance"] if isinstance(cond, dict) else cond
            cond = cond.view(-1, *(1,) * (x.ndim - 1))
            return (torch.sin(3 * x + shift) * (0.7 + 0.2 * cond) + 0.3 * cond).to(dtype)

        return network

    model = sampler.denoiser(fn(0.0), prediction, {"weak": fn(0.1), "student": fn(0.2)})
    if rule == "embedded":
        return sampler.Engine(model), sampler.Cond(cond={"guidance": torch.ones(rows)})
    extra = {"target": torch.arange(rows) % 4, "classes": torch.linspace(-1, 1, 4)}
    cond = sampler.Cond(cond=torch.ones(rows), uncond=torch.zeros(rows), extra=extra)
    return sampler.Engine(model), cond


def judge(x):
    """Logits [B, 4] of a classifier that nobody trained."""
    return x.flatten(1).sin().mean(1, keepdim=True) * torch.linspace(-1, 2, 4)


FITTED = Coefficients(
    tuple(tuple(0.9 / (t + 1) for _ in range(t + 1)) for t in range(8)),
    tuple(tuple(0.1 / t for _ in range(t)) for t in range(8)),
)

# What a strategy needs beyond its name to be built and started; others are tried without.
NEEDED = {
    "classifier": {"classifier": judge},
    "gfcg": {"classifier": judge},
    "linear_ag": {"coefficients": FITTED, "policy": (1, 0, 1, 0, 0, 0, 0, 0)},
}


def buildable(kind):
    """The registered strategies that can be built without files and measurements, by name."""
    found = {}
    for name in registry.names(kind):
        try:
            found[name] = registry.build(kind, {"name": name, **NEEDED.get(name, {})})
        except (ValueError, TypeError, sampler.SamplerError):
            continue
    return found


def both(walk, snapshot):
    """The next snapshot from the same one: (by the reference, by Triton)."""
    with torch.no_grad():
        with use_backend("reference"):
            right = next(walk(snapshot))
        with use_backend("triton"):
            mine = next(walk(snapshot))
    return right, mine


def gap(right, mine):
    """The largest relative difference of two trees of tensors."""
    worst = 0.0
    pairs = list(zip(leaves(right), leaves(mine), strict=True))
    for a, b in pairs:
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            same = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-12)
            worst = max(worst, float(same) if not torch.equal(a, b) else 0.0)
            assert a.isfinite().all() == b.isfinite().all()
        else:
            assert a == b
    return worst
