"""The small networks of the golden data and of the laws, as engines without a pipeline."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sampler
from sampler.core.trajectory import Run
from sampler.engine import Engine
from sampler.training.session import Session

GOLDEN = Path(__file__).parents[1] / "golden" / "finetune"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = sampler.Schedule.from_config(
    {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}, "DDIMScheduler"
)


class Net(nn.Module):
    """h = tanh(conv(x)·(1 + t/1000) + linear(mean of the tokens)), out = conv(h); float64."""

    def __init__(self, weights=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.c1, self.c2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.e = nn.Linear(5, 6)
        self.double()
        if weights is not None:
            self.load_state_dict(weights)

    def forward(self, x, level, cond):
        embedding = self.e(cond.mean(1))[:, :, None, None]
        return self.c2(torch.tanh(self.c1(x) * (1 + level.t / 1000) + embedding))


def golden(name):
    stored = np.load(GOLDEN / f"{name}.npz")
    return stored, json.loads(str(stored["cases_json"])) if "cases_json" in stored else []


def world(net, steps, scale, eta=0.0, rows=2, grid=None):
    """(session, run) of a guided DDIM run of `net` on random float64 latents."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rule = {"name": "cfg", "scale": scale} if scale != 1 else "none"
    engine = Engine(sampler.denoiser(net), sampler={"name": "ddim", "eta": eta}, guidance=rule)
    cond = sampler.Cond(cond=draw(rows, 3, 5), uncond=draw(rows, 3, 5))
    return begin(engine, draw(rows, 4, 4, 4), grid or SCHEDULE.grid(steps), cond)


def begin(engine, x, grid, cond):
    session = Session(
        engine, None, engine.sampler, engine.guidance, len(grid) - 1, (16, 16), len(x)
    )
    snapshot, levels = engine.start(x, grid, cond, seeds=range(len(x)))
    return session, Run(snapshot, levels, cond, engine.sampler, engine.guidance)


def gradient(net, loss):
    """The flat gradient over the parameters, in their order."""
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([g.flatten() for g in grads])
