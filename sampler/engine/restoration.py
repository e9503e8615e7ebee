"""`engine.restore`: images from a measurement, with their mean and their uncertainty."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sampler.core.batch import Output, Result, to_output
from sampler.core.images import as_images
from sampler.core.loop import Loop
from sampler.registry.constraints import as_int
from sampler.rewards.python import code_from, is_python
from sampler.samplers import operators
from sampler.samplers.difface import contraction
from sampler.samplers.methods import Problem, strategies


@dataclass(frozen=True)
class Restored:
    """Result of `restore`.

    images: n PIL images, or a tensor [n, 3, H, W] in [0, 1]; mean, std: [3, H, W], over the n
    images (std 0 for one), or over 100 draws of `vble`, in units of [0, 1]; seeds; nfe per image;
    config: plain settings of the run (operators and measurements as given); contraction:
    alpha_N²/sigma_N² of `difface`, remaining fraction of its restorer's squared error, else None;
    seconds.
    """

    images: Any
    mean: Tensor
    std: Tensor
    seeds: list[int]
    nfe: list[int]
    config: dict[str, Any]
    contraction: float | None
    seconds: float


def restore(
    engine: Loop,
    y: Any,
    operator: Any,
    method: str | None,
    noise: float | None,
    n: int,
    prompt: str | int,
    steps: int | None,
    restorer: Any,
    strength: float | None,
    seeds: int | Sequence[int] | None,
    guidance: Any,
    batch_size: int | None,
    output: Output,
    allow_python: bool,
) -> Restored:
    """Restore a measurement; see `Engine.restore`."""
    if output not in ("pil", "tensor"):
        raise ValueError(f"output = {output!r} must be 'pil' or 'tensor'.")
    measured = _measured(y)
    if method == "vble":
        if prompt != "" or (guidance, restorer, strength) != (None,) * 3:
            raise ValueError(
                "restore: vble evaluates no network; leave out prompt, guidance, restorer and "
                "strength."
            )
        return _variational(engine, measured, operator, noise, n, steps, seeds, batch_size, output)
    steps = 50 if steps is None else steps
    if guidance is None:
        guidance = "none" if prompt == "" else engine.guidance
    if is_python(restorer):
        restorer = code_from("restorer", restorer, allow_python, "(images)")
    size = engine.pipeline.size(*_size(operators.build(operator), measured))
    run: dict[str, Any] = {"n": n, "steps": steps, "height": size[0], "width": size[1]}
    run |= {"seeds": seeds, "batch_size": batch_size, "output": "tensor"}
    if restorer == "reddiff":
        problem = Problem(operator, measured, None, guidance)
        _, sampler, rule = strategies("reddiff", problem)
        first = _generate(engine, prompt, {**run, "n": 1, "seeds": 0}, sampler, rule)
        restorer = _constant(first.images)
    problem = Problem(operator, measured, noise, guidance, restorer, strength)
    method, sampler, rule = strategies(method, problem)
    result = _generate(engine, prompt, run, sampler, rule)
    images: Tensor = result.images
    left = None
    if method == "difface":
        from sampler import registry

        built = registry.build("sampler", sampler)
        left = contraction(built.levels(engine.pipeline.grid(steps, size)))
    return Restored(
        to_output(images, output),
        images.mean(0),
        images.std(0, correction=min(1, len(images) - 1)),
        result.seeds,
        result.nfe,
        {**result.config, "method": method},
        left,
        result.seconds,
    )


def _variational(
    engine: Loop,
    y: Tensor,
    operator: Any,
    noise: float | None,
    n: int,
    steps: int | None,
    seeds: int | Sequence[int] | None,
    batch_size: int | None,
    output: Output,
) -> Restored:
    """Restore by `sampler.samplers.variational.VBLE`: moments of its draws, n of them as images."""
    from sampler.samplers.measurement import measurement
    from sampler.samplers.variational import VBLE

    started = time.perf_counter()
    if noise is None:
        raise ValueError("The method 'vble' needs noise, such as 0.05; without it use reddiff.")
    count = as_int(n, "n")
    if count < 1:
        raise ValueError(f"n = {n} must be at least 1.")
    given = [seeds] if seeds is None or isinstance(seeds, int) else list(seeds)
    if len(given) != 1:
        raise ValueError("restore: vble fits one distribution and draws n images; give one seed.")
    seed = as_int(given[0] or 0, "seeds")
    options: dict[str, Any] = {"samples": max(count, VBLE.samples)}
    options |= {} if steps is None else {"iterations": as_int(steps, "steps")}
    options |= {} if batch_size is None else {"batch": as_int(batch_size, "batch_size")}
    vble = VBLE(float(noise), **options)
    made = measurement(operator, y, name="vble", needs_start=True)
    size = engine.pipeline.size(*_size(operators.build(operator), y))
    found = vble.restore(engine.pipeline, made, size, [seed], keep=count)
    config = {"method": "vble", "operator": operator, "y": y, **asdict(vble)}
    return Restored(
        to_output(found.images[0], output),
        found.mean[0],
        found.std[0],
        [seed],
        [0] * count,
        config,
        None,
        time.perf_counter() - started,
    )


def _generate(
    engine: Any, prompt: str | int, run: dict[str, Any], sampler: Any, rule: Any
) -> Result:
    return engine.generate(prompt, sampler=sampler, guidance=rule, **run)


def _measured(y: Any) -> Tensor:
    """The measurement [1, ...] in the operator's range; image files and PIL images in [-1, 1]."""
    if isinstance(y, Tensor):
        if y.ndim < 2 or len(y) != 1:
            raise ValueError(
                f"restore: y {tuple(y.shape)} must be one measurement [1, ...]; call it for each."
            )
        return y
    return as_images(y) * 2 - 1


def _size(operator: Any, y: Tensor) -> tuple[int | None, int | None]:
    """(height, width) of the measured image; None where the operator does not determine it."""
    pseudo_inverse = getattr(operator, "A_dagger", None)
    if pseudo_inverse is None:
        return None, None
    with torch.no_grad():
        found = pseudo_inverse(y)
    return (found.shape[-2], found.shape[-1]) if found.ndim == 4 else (None, None)


def _constant(images: Tensor) -> Any:
    return lambda _: images
