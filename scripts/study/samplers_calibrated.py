"""The shipped momentum numbers on held-out prompts and seeds.

For every setting whose number is not the default: the error of both against a run of ten times the
steps, image by image, as `sampler calibrate momentum` measures it. Where the shipped number is the
default there is nothing to compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import sampler
from sampler.bundled import prompts
from sampler.calibration.momentum import FINER, REFERENCE, squared_errors
from sampler.samplers.calibrated import BUNDLED
from sampler.samplers.momentum import DEFAULT

FIRST_PROMPT, FIRST_SEED = 900, 300_000
BATCH, BOOTSTRAPS = 8, 2000


def study(done: Sequence[Mapping[str, str]], images: int = 16) -> Iterator[dict[str, Any]]:
    """Yield one row per setting that is missing in `done` for the shipped file's numbers."""
    engine, stored = sampler.load(), json.loads(BUNDLED.read_text(encoding="utf-8"))
    known = {(r["model"], int(r["steps"]), float(r["scale"]), float(r["number"])) for r in done}
    for entry in stored["entries"]:
        steps, scale, number = (entry[k] for k in ("steps", "scale", "momentum_number"))
        if number == DEFAULT or (stored["model"], steps, scale, number) in known:
            continue
        exact = _latents(engine, REFERENCE, FINER * steps, scale, images)
        ours, default = (
            squared_errors(
                _latents(engine, {"name": "ghvb", "momentum_number": m}, steps, scale, images),
                exact,
            )
            for m in (number, DEFAULT)
        )
        row = {"model": stored["model"], "steps": steps, "scale": scale, "number": number}
        yield row | {"images": images} | compared(ours, default)


def compared(ours: Tensor, default: Tensor) -> dict[str, float]:
    """Root mean square errors from squared errors per image [N], and their ratio's interval.

    The interval is 95 % of a bootstrap over the images.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ours), (BOOTSTRAPS, len(ours)), generator=generator)
    ratios = (ours[drawn].mean(1) / default[drawn].mean(1)).sqrt()
    low, high = (float(ratios.quantile(q)) for q in (0.025, 0.975))
    one, other = float(ours.mean().sqrt()), float(default.mean().sqrt())
    share = float((ours < default).double().mean())
    return {
        "error": one,
        "default": other,
        "ratio": one / other,
        "low": low,
        "high": high,
        "nearer": share,
    }


def _latents(
    engine: sampler.Engine, method: Mapping[str, Any], steps: int, scale: float, count: int
) -> Tensor:
    return engine.generate(
        [p.text for p in prompts(count, start=FIRST_PROMPT)],
        seeds=FIRST_SEED,
        steps=steps,
        sampler=method,
        guidance={"name": "cfg", "scale": scale},
        batch_size=BATCH,
        output="latent",
    ).latents.double()
