"""Images of the teacher, generated once: real samples of the discriminator, regression pairs.

    RUN/teacher/000000.safetensors ...   latents of the teacher's images

The seed of the noise of an image is known, so that the two are a regression pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from sampler.core.durable import make_folder, write_file
from sampler.training.batches import derived
from sampler.training.data import LatentSet, data_samples
from sampler.training.f_distill.fields import DistillFields
from sampler.training.session import Session
from sampler.training.settings import Settings

IMAGES_PER_FILE = 64


def samples_of(
    trainer: DistillFields, session: Session, prompts: list[str], out: Path, settings: Settings
) -> tuple[LatentSet | None, LatentSet | None]:
    """Return the samples of the discriminator and the pairs of the warm-up.

    They are generated where they are not on disk yet. Raises ValueError for a prompt without a
    sample.
    """
    own = None
    if trainer.needs_samples:
        precision, folder, count = settings.mixed_precision, out / "teacher", trainer.samples
        own = teacher_samples(session, prompts, count, settings.seed, folder, precision)
    real = own if trainer.gan_weight else None
    if trainer.gan_weight and trainer.data is not None:
        real = data_samples(session, trainer.data, out / "data.safetensors")
    if real is not None:
        real.check(prompts)
    return real, own if trainer.warmup else None


def teacher_samples(
    session: Session, prompts: Sequence[str], count: int, seed: int, out: Path, precision: str
) -> LatentSet:
    """Generate images of the prompts in turn with the teacher; read those on disk already."""
    make_folder(out)
    texts = [prompts[i % len(prompts)] for i in range(count)]
    seeds = [derived(seed, i, "teacher") for i in range(count)]
    device = session.pipeline.device.type
    latents = []
    for first in range(0, count, IMAGES_PER_FILE):
        path, part = out / f"{first:06d}.safetensors", slice(first, first + IMAGES_PER_FILE)
        if not path.is_file():
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                generated = session.engine.generate(
                    texts[part],
                    negative=session.negative or None,
                    seeds=seeds[part],
                    steps=session.steps,
                    height=session.size[0],
                    width=session.size[1],
                    sampler=session.method,
                    guidance=session.rule,
                    batch_size=session.micro,
                    output="latent",
                ).latents
            write_file(path, save({"latents": generated.float().cpu().contiguous()}))
        latents.append(load_file(path)["latents"])
    return LatentSet(torch.cat(latents), tuple(texts), tuple(seeds))
