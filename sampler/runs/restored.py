"""Restorations of image files as lines of a run, and their mean and spread as images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sampler.core.errors import UsageError
from sampler.core.image_files import image_size, open_image
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import JobSettings
from sampler.runs.readers import RawLine
from sampler.samplers.methods import Problem, strategies

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
RESTORED = "restored"  # folder in that of the run, and mark of such a run in its run.json
WHITE = 0.25
"""Standard deviation, of values in [0, 1], that is white in a map of the spread."""


def image_files(where: str) -> list[Path]:
    """An image file, or the images of a folder by name. Raises UsageError where there is none."""
    path = Path(where).expanduser().resolve()
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f"{where} holds no image; use PNG, JPEG or WebP files.")
    return found


def lines(
    files: list[Path],
    operator: Mapping[str, Any],
    prompt: str,
    method: str | None,
    noise: float | None,
    guidance: Any,
    restorer: str | None,
    strength: float | None,
) -> list[RawLine]:
    """One line of a run per image: its prompt, sampler, rule and size.

    guidance: None leaves the model's default, which is "cfg" inside the rule `data`, and is "none"
    for an empty prompt. Raises UsageError for what no method can restore.
    """
    if guidance is None and not prompt:
        guidance = "none"
    found: list[RawLine] = []
    for file in files:
        width, height = image_size(file)
        factor = operator.get("factor", 1)
        rule = "cfg" if guidance is None else guidance
        problem = Problem(dict(operator), str(file), noise, rule, restorer, strength)
        try:
            _, sampler, rule = strategies(method, problem)
        except ValueError as error:
            raise UsageError(str(error)) from None
        cells: dict[str, Any] = {"prompt": prompt, "sampler": sampler}
        cells |= {"width": width * factor, "height": height * factor}
        if guidance is not None or rule != "cfg":
            cells["guidance"] = rule
        found.append(RawLine(str(file), cells, empty_prompt=True))
    return found


def summaries(run: RunFolder) -> Iterator[tuple[str, bytes]]:
    """Yield (name, PNG) of the mean and the spread of each image with several restorations.

    The spread is the standard deviation over the restorations, root mean square over the channels,
    grey: black is 0, white WHITE and more. Images with missing restorations are left out.
    """
    entries = run.results().entries
    by_line: dict[int, list[int]] = {}
    for job in run.jobs():
        by_line.setdefault(job.line, []).append(job.index)
    for line, indices in by_line.items():
        files = [entries.get(run.key(index), {}).get("file") for index in indices]
        if len(files) < 2 or not all(files):
            continue
        pixels = np.stack([_pixels(run, str(file)) for file in files])
        stem = _measured(run.groups[run.job(indices[0]).group]).stem
        spread = np.sqrt(pixels.var(0, ddof=1).mean(-1)) / WHITE
        yield f"{RESTORED}/{line:06d}_{stem}_mean.png", _png(pixels.mean(0))
        yield f"{RESTORED}/{line:06d}_{stem}_std.png", _png(spread)


def _measured(settings: JobSettings) -> Path:
    """The file that was restored: of the sampler, or of the rule `data`."""
    strategies = (settings.sampler, settings.guidance)
    return Path(next(spec["y"] for spec in strategies if "y" in spec))


def _pixels(run: RunFolder, file: str) -> np.ndarray:
    data = run.store.read(file)
    if data is None:
        raise UsageError(f"{run.store.where}/{file} is missing; `sampler resume` regenerates it.")
    with open_image(data) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _png(values: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
