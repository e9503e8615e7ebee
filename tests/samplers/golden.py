"""The golden files: what they hold is in tests/golden/samplers/README.md."""

import json
import math
from pathlib import Path

import numpy as np
import torch

import sampler
from sampler.types import Level
from tests.analytic import Mixture

FOLDER = Path(__file__).parents[1] / "golden" / "samplers"


def arrays(name):
    return np.load(FOLDER / f"{name}.npz")


def cases(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["cases"]


def mixture(data, prefix="gmm"):
    return Mixture(*(torch.from_numpy(data[f"{prefix}_{k}"]) for k in ("w", "mu", "sd")))


def level(table, t):
    acp = float(table[int(t)])
    return Level(int(t), math.sqrt(acp), math.sqrt(1 - acp))


def case_levels(data, key, base):
    """The levels of a momentum case; the euler base has its own sigmas, in units of sigma/alpha."""
    if base == "euler":
        sigmas = data[f"{key}_sigmas"].tolist()
        return [Level(s, 1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)) for s in sigmas]
    table = data["alphas_cumprod"]
    return [level(table, t) for t in (*data[f"{key}_timesteps"], 0)]


def spec(case):
    """The sampler of a case."""
    if case["sampler"] in ("dpmpp2m", "unipc"):
        base = {"dpmpp2m": "dpmpp_2m", "unipc": "unipc"}[case["sampler"]]
        compat = "published" if base == "unipc" else "clean"
        return {"name": "heavy_ball", "base": base, "beta": case["beta"], "compat": compat}
    name = {"hb": "heavy_ball", "ghvb": "ghvb", "nt": "nesterov"}[case["sampler"]]
    return {"name": name, "momentum_number": case["momentum_number"]}


def trajectory(method, eps, x, levels):
    """Every x of a run, first to last; eps(x, level)."""
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: eps(x, level)))
    first, grid = engine.start(x, levels, sampler=method)
    return [first.x, *(s.x for s in engine.steps(first, grid, sampler=method))]
