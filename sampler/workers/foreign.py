"""Regenerate an image of another program from its embedded settings.

The same sampler, grid, scale and prompt; not the same pixels, since other programs draw the first
noise differently, and the model is the one that the caller names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sampler import registry
from sampler.core.errors import UsageError
from sampler.core.loop import Loop
from sampler.runs import metadata
from sampler.runs.encodings import Encoding, media_size
from sampler.runs.foreign import Foreign
from sampler.runs.jobs import Job, JobSettings, Model, key_of, record_of
from sampler.runs.settings import complete_spec, with_scale
from sampler.samplers.aliases import alias
from sampler.types import MAX_SEED
from sampler.workers.batch_runner import BatchRunner
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.replay import pixels_of
from sampler.workers.work import dtype_of


def from_foreign(engine: Loop, model: Model, found: Foreign, encoding: Encoding) -> bytes:
    """File content of the image, with a record of ours; see `settings_of_image`."""
    settings = settings_of_image(engine, found)
    seed = (found.seed or 0) & MAX_SEED  # ComfyUI's have one bit more
    job = Job(0, "", 0, 0, found.prompt, found.negative_prompt, seed)
    job = replace(job, key=key_of(record_of(job, settings, model)))
    (outcome,) = BatchRunner(engine, PromptCache(engine.pipeline)).batch([job], [settings])
    pixels = pixels_of(outcome)
    size = media_size(pixels)
    libraries = metadata.library_versions()
    texts = metadata.texts(job, settings, model, size, "full", libraries, dtype_of(engine))
    return encoding.encode(pixels, texts)


def settings_of_image(engine: Loop, found: Foreign) -> JobSettings:
    """Settings of a run: the image's, and the engine's for missing ones.

    Raises UsageError for an image without a number of steps, ValueError for samplers and grids that
    are not there.
    """
    if found.steps is None:
        raise UsageError(f"The image of {found.program} does not state its number of steps.")
    known: dict[str, Any] = {"sampler": registry.spec_of(engine.sampler), "grid": None}
    if found.sampler is not None:
        known = alias(found.sampler)
    rule = registry.spec_of(engine.guidance)
    if found.scale is not None:
        rule = "none" if found.scale == 1 and "scale" not in rule else with_scale(rule, found.scale)
    size = engine.pipeline.size(found.height, found.width)
    return JobSettings(
        found.steps,
        *size,
        complete_spec("sampler", known["sampler"]),
        complete_spec("guidance", rule),
        grid=known["grid"] if found.grid is None else found.grid,
    )
