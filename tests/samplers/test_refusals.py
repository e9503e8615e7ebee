"""Bad samplers: refused when the engine is built, or before it evaluates, in one sentence."""

import re

import pytest
import torch

import sampler
from sampler.samplers import operators
from tests.analytic import vp_grid

Y = torch.zeros(1, 3, 4, 4)
BUILT = [
    {"name": "ghvb", "beta": 0.0},
    {"name": "heavy_ball", "beta": -0.2},
    {"name": "ghvb", "beta": 1.01},
    {"name": "nesterov", "order": 6},
    {"name": "ab", "order": 6},
    {"name": "ghvb", "momentum_number": 5.2},
    {"name": "ghvb", "momentum_number": "calibrate"},
    {"name": "heavy_ball", "base": "dpmpp_2m", "momentum_number": 0.5},
    {"name": "ddim", "eta": -0.1},
    {"name": "ddim", "eta": 1.5},
    {"name": "reddiff", "operator": "denoise", "y": Y, "init": torch.zeros(1, 3, 5, 5)},
    {"name": "reddiff", "operator": {"name": "superres", "factor": 2}, "y": Y, "init": Y},
    {"name": "reddiff", "operator": operators.Inpaint(torch.ones(8, 8)), "y": Y},
    {"name": "reddiff", "operator": {"name": "superres", "factor": 3}, "y": Y, "init": Y},
    {"name": "reddiff", "operator": lambda x: x, "y": Y},
    {"name": "reddiff", "operator": "denoise", "y": Y, "weight": "cubic"},
]
RUN = [
    {"name": "ghvb", "space": "flow"},
    {"name": "ab", "space": "flow"},
    {"name": "ghvb", "momentum_number": "calibrated:file.json"},
    {"name": "reddiff", "operator": "denoise", "y": torch.zeros(1, 3, 8, 8)},
]


def never(x, level, cond):
    raise AssertionError("the network was called")


def is_one_sentence(error):
    text = str(error.value)
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


@pytest.mark.parametrize("spec", BUILT, ids=lambda spec: spec["name"])
def test_when_the_engine_is_built(spec):
    with pytest.raises(ValueError) as error:
        sampler.Engine(sampler.denoiser(never), sampler=spec)
    assert is_one_sentence(error), error.value
    assert str(error.value).startswith(spec["name"]) or spec["name"] == "reddiff"


@pytest.mark.parametrize("spec", RUN, ids=lambda spec: spec["name"])
def test_before_the_first_evaluation(spec):
    engine = sampler.Engine(sampler.denoiser(never), sampler=spec)
    with pytest.raises(ValueError) as error:
        engine.run(torch.zeros(1, 3, 4, 4), vp_grid(4))
    assert is_one_sentence(error), error.value
