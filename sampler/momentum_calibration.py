"""Calibration of GHVB's momentum number for a model: the best of a grid against a long run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler import registry
from sampler.binding import fingerprint
from sampler.engine import Engine
from sampler.samplers.calibrated import FORMAT, Key, key_of
from sampler.samplers.momentum import DEFAULT

NUMBERS = (1.0, 1.2, 1.5, 1.8, 2.0, 2.3, 2.6, 3.0)
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
    """What a calibration file holds: for every steps × rule the number of least error.

    The error is the root mean square over the latents of all prompts against a run with ten times
    the steps (image i has seed + i), relative to that run's. The default number is always among
    the candidates, and kept unless another is at least 2 % better on these prompts.

    Raises ValueError for no prompts, and numbers that GHVB refuses.
    """
    if not prompts:
        raise ValueError("A calibration needs at least one prompt.")
    candidates = sorted({*numbers, DEFAULT})
    adapter: Any = engine.pipeline
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
            errors = {
                m: _error(run(count, rule, {"name": "ghvb", "momentum_number": m}), exact)
                for m in candidates
            }
            best = min(errors, key=errors.__getitem__)
            chosen = best if errors[best] < 0.98 * errors[DEFAULT] else DEFAULT
            key = key_of("ghvb", adapter.grid(count, adapter.size(None, None)), spec)
            entries.append(_entry(key, chosen, errors, len(prompts)))
    return {"format": FORMAT, "model": fingerprint(adapter.network), "entries": entries}


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


def _error(latents: Tensor, exact: Tensor) -> float:
    gap = torch.nan_to_num(latents - exact, nan=torch.inf).square().mean()
    return float((gap / exact.square().mean()).sqrt())


def _entry(key: Key, chosen: float, errors: Mapping[float, float], count: int) -> dict[str, Any]:
    return {
        **key._asdict(),
        "momentum_number": chosen,
        "errors": {f"{m:g}": round(e, 6) for m, e in errors.items()},
        "prompts": count,
    }
