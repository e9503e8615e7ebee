"""Real samples of the discriminator: images of the teacher, or a data set.

    RUN/teacher/000000.safetensors ...   latents of the teacher's images, generated once
    RUN/data.safetensors                 latents of a folder of images, encoded once

The seed of the noise of a teacher's image is known, so that the two are a regression pair.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sampler.core.durable import make_folder, write_file
from sampler.core.errors import UsageError
from sampler.core.images import read
from sampler.training.batches import derived
from sampler.training.session import Session

IMAGES_PER_FILE = 64


@dataclass(frozen=True)
class LatentSet:
    """latents [N, ...], their prompts, and the seeds of their noise (teacher's images only)."""

    latents: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = ()

    def choose(self, wanted: Sequence[str], numbers: Sequence[float]) -> list[int]:
        """Choose the index of a sample of each prompt, by a number in [0, 1) each."""
        known = self._by_prompt
        return [known[p][int(u * len(known[p]))] for p, u in zip(wanted, numbers, strict=True)]

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt without a sample."""
        if missing := [p for p in prompts if p not in self._by_prompt]:
            raise ValueError(
                f"data: no sample has the prompt {missing[0]!r:.60}; give prompts that are "
                "captions of the data, or at least as many samples as prompts."
            )

    @cached_property
    def _by_prompt(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(self.prompts):
            found[prompt].append(i)
        return dict(found)


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


def data_samples(session: Session, source: str, out: Path) -> LatentSet:
    """Read a data set: a .safetensors file, or a folder of images, which is encoded into `out`.

    The file has `latents` [N, ...], scaled as the pipeline's, and a JSON list `prompts` in its
    metadata. The folder has metadata.jsonl with a line {"file_name": ..., "text": ...} per image,
    and images of the trained size. Raises SamplerError (2) for an unreadable data set.
    """
    path = Path(source)
    if path.is_dir():
        if not out.is_file():
            _encode_folder(session, path, out)
        path = out
    try:
        with safe_open(path, "pt") as stored:
            latents = stored.get_tensor("latents").float()
            prompts = tuple(map(str, json.loads((stored.metadata() or {})["prompts"])))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(
            f"data = {source} is neither a folder of images nor a file of latents "
            f"with their prompts: {error}.",
        ) from None
    shape = session.pipeline.latent_shape(*session.size)
    if tuple(latents.shape[1:]) != tuple(shape) or len(latents) != len(prompts):
        raise UsageError(
            f"data: {source} holds {tuple(latents.shape)} latents and {len(prompts)} "
            f"prompts; a latent of this run is {tuple(shape)}.",
        )
    return LatentSet(latents, prompts)


def _encode_folder(session: Session, folder: Path, out: Path) -> None:
    listing = folder / "metadata.jsonl"
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
        entries: list[Any] = [json.loads(line) for line in lines if line.strip()]
        named = [(folder / entry["file_name"], str(entry["text"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'data: {listing} must have {{"file_name": ..., "text": ...}} per line: {error}.'
        ) from None
    latents = []
    for path, _ in named:
        image = read(path)
        if tuple(image.shape[-2:]) != session.size:
            raise UsageError(
                f"data: {path} is {image.shape[-1]} x {image.shape[-2]} pixels; this run "
                f"needs {session.size[1]} x {session.size[0]}.",
            )
        with torch.no_grad():
            latents.append(session.pipeline.latents_of(image).float().cpu())
    prompts = json.dumps([text for _, text in named])
    write_file(out, save({"latents": torch.cat(latents)}, {"prompts": prompts}))
