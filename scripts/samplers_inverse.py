"""RED-Diff on the bundled model: PSNR and SSIM per operator, with two baselines.

The images are samples of the model at seeds of their own (one per prompt), measured, and restored
without being told the prompt. Baselines: the pseudo-inverse, and DPS with as many evaluations.

DPS (Chung et al., 2023, arXiv:2209.14687, Algorithm 1): ancestral DDIM, then a step down the
gradient of ‖y − A(decode(x0_hat(x)))‖ with respect to x, through the network, of length zeta.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sampler
from sampler.binding import fingerprint
from sampler.bundled import prompts
from sampler.noise import Noise, initial
from sampler.samplers import operators
from sampler.types import spans

STEPS = 50
BATCH = 32
FIRST_SEED = 500_000
ZETA = 0.5
LR, LAM = 0.1, 0.25


def tasks() -> dict[str, tuple[Any, float]]:
    """Operator and measurement noise (standard deviation as a share of the range) by name."""
    mask = torch.ones(64, 64)
    mask[20:44, 20:44] = 0
    return {
        "inpaint, 24 x 24 box": (operators.Inpaint(mask), 0.0),
        "superres x4, average": (operators.build({"name": "superres", "factor": 4}), 0.0),
        "deblur, gaussian 2": (operators.build({"name": "deblur", "sigma": 2.0}), 0.02),
        "denoise 0.1": (operators.build("denoise"), 0.1),
        "jpeg 20": (operators.build({"name": "jpeg", "quality": 20}), 0.0),
        "hdr": (operators.build("hdr"), 0.0),
    }


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB per image [B], images in [0, 1]."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Per image [B]: Wang et al. (2004), Gaussian window of 1.5 pixels, images in [0, 1]."""
    offset = torch.arange(11.0) - 5
    line = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    top = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2)
    return (top / ((ma * ma + mb * mb + 0.01**2) * (va + vb + 0.03**2))).flatten(1).mean(1)


def study(done: Sequence[Mapping[str, str]], images: int) -> Iterator[dict[str, Any]]:
    """One row per operator and method that is not in `done` yet for this model."""
    engine = sampler.load()
    model = fingerprint(engine.pipeline.network)
    known = {(r["model"], r["task"], r["method"]) for r in done}
    texts = [p.text for p in prompts(images, start=640)]
    truth = engine.generate(
        texts,
        seeds=FIRST_SEED,
        steps=20,
        guidance={"name": "cfg", "scale": 3.0},
        batch_size=BATCH,
        output="tensor",
    ).images
    methods: dict[str, Callable[..., Tensor]] = {
        "pseudo-inverse": lambda operator, y, _: operator.A_dagger(y) / 2 + 0.5,
        "reddiff": lambda operator, y, seeds: _reddiff(engine, operator, y, seeds, "none"),
        "reddiff, decay": lambda operator, y, seeds: _reddiff(engine, operator, y, seeds, "linear"),
        "dps": lambda operator, y, seeds: _dps(engine, operator, y, seeds),
    }
    for task, (operator, sigma) in tasks().items():
        for name, method in methods.items():
            if (model, task, name) in known:
                continue
            started = time.perf_counter()
            parts = []
            for first in range(0, images, BATCH):
                clean = truth[first : first + BATCH] * 2 - 1
                y = operators.measure(operator, clean, sigma, seed=first)
                seeds = list(range(first, first + len(clean)))
                parts.append(method(operator, y, seeds).clamp(0, 1))
            seconds = time.perf_counter() - started
            found = torch.cat(parts)
            a, b = psnr(found, truth), ssim(found, truth)
            error = float(a.std() / len(a) ** 0.5)
            yield {
                "model": model,
                "task": task,
                "method": name,
                "images": images,
                "steps": 0 if name == "pseudo-inverse" else STEPS,
                "psnr": float(a.mean()),
                "psnr_error": error,
                "ssim": float(b.mean()),
                "seconds": seconds,
            }


def _reddiff(
    engine: sampler.Engine, operator: Any, y: Tensor, seeds: list[int], decay: str
) -> Tensor:
    spec = {"name": "reddiff", "operator": operator, "y": y, "space": "image", "lr": LR, "lam": LAM}
    return engine.generate(
        [""] * len(y),
        seeds=seeds,
        steps=STEPS,
        sampler={**spec, "decay": decay},
        guidance="none",
        batch_size=len(y),
        output="tensor",
    ).images


def _dps(engine: sampler.Engine, operator: Any, y: Tensor, seeds: list[int]) -> Tensor:
    adapter: Any = engine.pipeline
    size = (64, 64)
    cond = adapter.encode([""] * len(y), [""] * len(y), False, size).cond
    levels = adapter.grid(STEPS, size)
    ancestral = sampler.build("sampler", {"name": "ddim", "eta": 1.0})
    x, noise = initial(seeds, adapter.latent_shape(*size)), Noise(tuple(seeds))
    for span in spans(levels):
        x = x.detach().requires_grad_()
        pred = adapter.predict(x, adapter.forward(x, span.now, cond, "main"), span.now, "main")
        gap = operator.A(adapter.decode(pred.x0.tensor()) * 2 - 1) - y
        norms = gap.flatten(1).norm(dim=1)
        (slope,) = torch.autograd.grad(norms.sum(), x)
        with torch.no_grad():
            move = ancestral.step(x, pred, span, ())
            x = sampler.settle(move.mean)
            if span.next.sigma:
                x = x + move.std * noise.draw(span.index, x)
            x = x - ZETA * slope
    with torch.no_grad():
        return adapter.decode(x.detach())
