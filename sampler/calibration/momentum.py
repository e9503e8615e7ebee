"""Calibration of GHVB's momentum number for a model: the best of a grid against a long run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler import registry
from sampler.core.binding import model_name
from sampler.engine import Engine
from sampler.samplers.calibrated import FORMAT, Key, calibration_key
from sampler.samplers.momentum import DEFAULT

NUMBERS = (1.0, 1.2, 1.5, 1.8, 2.0, 2.3, 2.6, 3.0)
# A number replaces the default where it lowers the logarithm of the error, image by image, by more
# than this many standard errors: logarithms, since a few images make up most of a sum of squares.
NOISE = 2.0
# The reference takes this many times the steps, with the sampler that is second order and stable.
FINER, REFERENCE = 10, {"name": "ghvb", "momentum_number": 1.8}


def calibrate_momentum(
    engine: Engine,
    prompts: Sequence[str],
    *,
    steps: Sequence[int] = (20,),
    guidance: Sequence[Mapping[str, Any]],
    numbers: Sequence[float] = NUMBERS,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Contents of a calibration file: for every steps × rule the number of least error.

    The error is the root mean square over the latents of all prompts against a run with ten times
    the steps (image i has seed + i), relative to that run's. The default number is always among
    the candidates, and kept unless the gain of another is beyond the noise of these prompts
    (`chosen`): a dozen prompts will do, with one the default is always kept.

    Raises ValueError for no prompts, and numbers that GHVB refuses.
    """
    if not prompts:
        raise ValueError("A calibration needs at least one prompt.")
    candidates = sorted({*numbers, DEFAULT})
    adapter = engine.pipeline
    done, total = 0, len(steps) * len(guidance) * (len(candidates) + 1)

    def run(count: int, rule: Any, method: Any) -> Tensor:
        nonlocal done
        latents = engine.generate(
            list(prompts),
            seeds=seed,
            steps=count,
            sampler=method,
            guidance=rule,
            batch_size=batch_size,
            output="latent",
        ).latents
        done += 1
        if progress is not None:
            progress(done, total)
        return latents.double()

    entries = []
    for rule in guidance:
        spec = registry.spec_of(registry.build("guidance", rule))
        for count in steps:
            exact = run(min(FINER * count, 1000), rule, REFERENCE)
            found = {
                m: squared_errors(run(count, rule, {"name": "ghvb", "momentum_number": m}), exact)
                for m in candidates
            }
            key = calibration_key("ghvb", adapter.grid(count, adapter.size(None, None)), spec)
            entries.append(_entry(key, found))
    return {"format": FORMAT, "model": model_name(adapter), "entries": entries}


def save(calibration: Mapping[str, Any], path: Path) -> None:
    """Writes the file that momentum_number = "calibrated:PATH" reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")


def plot(calibration: Mapping[str, Any], path: Path) -> None:
    """Draws error over momentum number, one line per setting, a dot at the chosen one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for entry in calibration["entries"]:
        pairs = sorted((float(m), e) for m, e in entry["errors"].items())
        label = f"{entry['steps']} steps, scale {entry['scale']:g}"
        (line,) = axes.semilogy(*zip(*pairs, strict=True), label=label)
        number = entry["momentum_number"]
        axes.plot(number, dict(pairs)[number], "o", color=line.get_color())
    axes.set(xlabel="momentum number", ylabel="error, relative to ten times the steps")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def squared_errors(latents: Tensor, exact: Tensor) -> Tensor:
    """Mean square of latents − exact per image [N], in units of the mean square of all of exact."""
    gap = torch.nan_to_num(latents - exact, nan=torch.inf).square().flatten(1).mean(1)
    return gap / exact.square().mean()


def chosen(found: Mapping[float, Tensor]) -> float:
    """The number of least error of those that are better than the default beyond noise; or that.

    found: squared errors [N] of the same N images per number, the default's among them.
    """
    better = (m for m in found if m == DEFAULT or is_better(found[DEFAULT], found[m]))
    return min(better, key=lambda m: float(found[m].mean()))


def is_better(default: Tensor, other: Tensor) -> bool:
    """Return True if squared errors [N] are below the default's of the same images beyond noise."""
    gain = default.log() - other.log()
    noise = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else math.inf
    # no noise can be named where the default diverged; then any finite errors are better
    return bool(gain.mean() > (0.0 if math.isnan(noise) else NOISE * noise))


def _entry(key: Key, found: Mapping[float, Tensor]) -> dict[str, Any]:
    return {
        **key._asdict(),
        "momentum_number": chosen(found),
        "errors": {f"{m:g}": round(float(e.mean().sqrt()), 6) for m, e in found.items()},
        "prompts": len(found[DEFAULT]),
    }
