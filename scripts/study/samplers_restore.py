"""Images of the bundled model, measured by an operator and restored by several methods.

The images are samples of the model at seeds of their own (one per prompt), and are restored without
being told the prompt, with `STEPS` evaluations of the network by every method.

Baselines of RED-Diff: the pseudo-inverse; the same optimisation of the latents without the
diffusion model (lam = 0), so that what the prior adds can be seen; and DPS (Chung et al., 2023,
arXiv:2209.14687, Algorithm 1): ancestral DDIM, then a step of length zeta down the gradient of
‖y − A(decode(x0))‖ with respect to x, through the network.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import sampler
from sampler.bundled import prompts
from sampler.core.noise import Noise, initial
from sampler.samplers import operators
from sampler.types import spans

Setting = dict[str, Any]

STEPS = 20
BATCH = 32
SIZE = (64, 64)
# The last of them are the published examples' settings.
GRID = [{"lr": lr, "lam": 0.01} for lr in (0.1, 0.25, 0.5)]
PUBLISHED = [{"lr": 0.25, "lam": lam} for lam in (0.05, 0.25)]
# method -> the settings among which it is tuned
METHODS: dict[str, list[Setting]] = {
    "pseudo-inverse": [{}],
    "dps": [{"zeta": zeta} for zeta in (0.5, 1.0, 2.0, 5.0, 12.0)],
    "no prior": [{"lr": lr, "lam": 0.0} for lr in (0.1, 0.25)],
    "reddiff": [*GRID, *PUBLISHED],
}
# Ours, compared on a few operators only: lr falls to 0; the last quarter's mu is averaged.
CALMED: dict[str, list[Setting]] = {
    f"reddiff, {name}": [{**setting, **change} for setting in GRID]
    for name, change in (("decay", {"decay": "linear"}), ("average", {"average": 0.25}))
}
CALMED_ON = ("superres", "inpaint", "denoise")


class Task(NamedTuple):
    """An operator, with the measurement noise relative to the value range."""

    operator: Any
    sigma: float = 0.0


def tasks() -> dict[str, Task]:
    """Return the tasks by name, in the order of the run."""
    mask = torch.ones(SIZE)
    mask[20:44, 20:44] = 0
    made = operators.build
    return {
        "superres x4": Task(made("superres")),
        "inpaint 24 x 24": Task(operators.Inpaint(mask)),
        "deblur gaussian 2": Task(made("deblur"), 0.02),
        "hdr": Task(made("hdr")),
        "compressed sensing 10 %": Task(operators.CompressedSensing((3, *SIZE), 0.1)),
        "denoise 0.1": Task(made("denoise"), 0.1),
        "phase": Task(made({"name": "phase", "pad": 16})),
        "jpeg 20": Task(made("jpeg")),
        "grayscale": Task(made("grayscale")),
    }


def methods_of(task: str) -> dict[str, list[Setting]]:
    """List the methods for a task."""
    return METHODS | (CALMED if task.startswith(CALMED_ON) else {})


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB per image [B], images in [0, 1]."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def pictures(engine: sampler.Engine, first: tuple[int, int], count: int) -> Tensor:
    """Samples of the model in [0, 1]: `count` from a first prompt and a first seed on."""
    return engine.generate(
        [p.text for p in prompts(count, start=first[0])],
        seeds=first[1],
        steps=20,
        guidance={"name": "cfg", "scale": 3.0},
        batch_size=BATCH,
        output="tensor",
    ).images


def restored(
    engine: sampler.Engine, method: str, case: Task, truth: Tensor, setting: Setting
) -> Tensor:
    """Restore images [B, 3, H, W] in [0, 1] from their measurements with one method."""
    operator, parts = case.operator, []
    for first in range(0, len(truth), BATCH):
        clean = truth[first : first + BATCH] * 2 - 1
        y = operators.measure(operator, clean, case.sigma, seed=first)
        seeds = list(range(first, first + len(clean)))
        if method == "pseudo-inverse":
            found = operator.A_dagger(y) / 2 + 0.5
        elif method == "dps":
            found = dps(engine, operator, y, [""] * len(y), seeds, **setting)
        else:
            found = _reddiff(engine, operator, y, seeds, setting)
        parts.append(found.clamp(0, 1))
    return torch.cat(parts)


def name_of(setting: Setting) -> str:
    """Format a setting as in the CSV files: "lr 0.1, lam 0.05"."""
    return ", ".join(
        f"{k} {v if isinstance(v, str) else format(v, 'g')}" for k, v in setting.items()
    )


def _reddiff(
    engine: sampler.Engine, operator: Any, y: Tensor, seeds: list[int], setting: Setting
) -> Tensor:
    spec = {"name": "reddiff", "operator": operator, "y": y, "space": "image", **setting}
    return engine.generate(
        [""] * len(y),
        seeds=seeds,
        steps=STEPS,
        sampler=spec,
        guidance="none",
        batch_size=len(y),
        output="tensor",
    ).images


def dps(
    engine: sampler.Engine,
    operator: Any,
    y: Tensor,
    texts: list[str],
    seeds: list[int],
    zeta: float,
    steps: int = STEPS,
) -> Tensor:
    """Restore measurements [B, ...] of the decoded images of some prompts by DPS."""
    adapter: Any = engine.pipeline
    cond = adapter.encode(texts, [""] * len(y), False, SIZE).cond
    levels = adapter.grid(steps, SIZE)
    ancestral = sampler.build("sampler", {"name": "ddim", "eta": 1.0})
    x, noise = initial(seeds, adapter.latent_shape(*SIZE)), Noise(tuple(seeds))
    for span in spans(levels):
        x = x.detach().requires_grad_()
        pred = adapter.predict(x, adapter.forward(x, span.now, cond, "main"), span.now, "main")
        gap = operator.A(adapter.decode(pred.x0.tensor()) * 2 - 1) - y
        (slope,) = torch.autograd.grad(gap.flatten(1).norm(dim=1).sum(), x)
        with torch.no_grad():
            move = ancestral.step(x, pred, span, ())
            x = sampler.settle(move.mean)
            if span.next.sigma:
                x = x + move.std * noise.draw(span.index, x)
            x = x - zeta * slope
    with torch.no_grad():
        return adapter.decode(x.detach())
