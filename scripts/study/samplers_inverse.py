"""RED-Diff and its baselines (`samplers_restore.py`): PSNR, SSIM and time per operator.

Every method is tuned first, by PSNR, over a small grid of its settings, on other prompts and seeds
than those measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import sampler
from sampler.core.binding import network_hash
from sampler.metrics import ssim
from scripts.study.samplers_restore import (
    METHODS,
    STEPS,
    Setting,
    methods_of,
    name_of,
    pictures,
    psnr,
    restored,
    tasks,
)

Rows = Sequence[Mapping[str, str]]

IMAGES, TUNED_ON = 64, 8
# (first prompt, first seed): neither was used in training, nor is one the other's.
MEASURED, TUNING, SHOWN = (640, 500_000), (1200, 700_000), (1300, 900_000)


def tuning(done: Rows) -> Iterator[dict[str, Any]]:
    """Yield one row per task, tunable method and setting that is missing in `done`."""
    engine = sampler.load()
    known = {(r["model"], r["task"], r["method"], r["setting"]) for r in done}
    model, truth = network_hash(engine.pipeline.network), pictures(engine, TUNING, TUNED_ON)
    for task, case in tasks().items():
        for method, grid in methods_of(task).items():
            for setting in grid if len(grid) > 1 else ():
                if (model, task, method, name_of(setting)) not in known:
                    found = restored(engine, method, case, truth, setting)
                    row = {"model": model, "task": task, "method": method}
                    row |= {"setting": name_of(setting), "steps": STEPS, "images": TUNED_ON}
                    yield row | {"psnr": float(psnr(found, truth).nan_to_num(-99).mean())}


def study(done: Rows, tuned: Rows, images: int = IMAGES) -> Iterator[dict[str, Any]]:
    """Yield one row per task and method, at its best setting, that is missing in `done`.

    The first is of no task: the true images after the autoencoder alone.
    """
    engine = sampler.load()
    known = {(r["model"], r["task"], r["method"]) for r in done}
    model, truth = network_hash(engine.pipeline.network), pictures(engine, MEASURED, images)

    def row(task: str, method: str, setting: Setting, found: Tensor) -> dict[str, Any]:
        made = {"model": model, "task": task, "method": method, "setting": name_of(setting)}
        made |= {"images": images, "steps": STEPS if setting else 0}
        for name, values in (("psnr", psnr(found, truth)), ("ssim", ssim(found, truth))):
            made |= {name: float(values.mean()), f"{name}_error": float(values.std()) / images**0.5}
        return made

    if (model, "none", "autoencoder") not in known:
        with torch.no_grad():
            found = engine.pipeline.decode(engine.pipeline.latents_of(truth)).clamp(0, 1)
        yield row("none", "autoencoder", {}, found)
    for task, case in tasks().items():
        for method in methods_of(task):
            if (model, task, method) not in known:
                setting = best_setting(tuned, task, method)
                yield row(task, method, setting, restored(engine, method, case, truth, setting))


def times(tuned: Rows) -> Iterator[dict[str, Any]]:
    """Seconds per image and method on super-resolution, in a batch of 8; the best of two runs."""
    engine, case = sampler.load(), tasks()["superres x4"]
    truth = pictures(engine, TUNING, TUNED_ON)
    for method in METHODS:
        setting, seconds = best_setting(tuned, "superres x4", method), []
        for _ in range(2):
            started = time.perf_counter()
            restored(engine, method, case, truth, setting)
            seconds.append(time.perf_counter() - started)
        yield {"method": method, "steps": STEPS, "seconds per image": min(seconds) / TUNED_ON}


def best_setting(tuned: Rows, task: str, method: str) -> Setting:
    """Return the setting with the highest tuning PSNR. Raises ValueError if one is missing."""
    grid = methods_of(task)[method]
    if len(grid) == 1:
        return grid[0]
    found = {
        r["setting"]: float(r["psnr"]) for r in tuned if (r["task"], r["method"]) == (task, method)
    }
    if missing := [name_of(s) for s in grid if name_of(s) not in found]:
        raise ValueError(f"{method} on {task} is not tuned yet: {missing[0]} is missing.")
    return max(grid, key=lambda s: found[name_of(s)])
