"""Data sets of images and captions: listed, encoded once, and held as latents.

    RUN/data.safetensors     latents of the images, scaled as the pipeline's, with their captions

A data set is one of
    a folder with metadata.jsonl, .csv or .parquet     a row per image, as below
    a folder of images                                 the caption of a.png is the text of a.txt
    a table .jsonl, .csv, .tsv or .parquet             columns file_name and text
    a file .safetensors                                latents [N, ...], captions in its metadata
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sampler.core.durable import write_file
from sampler.core.errors import UsageError
from sampler.core.images import read
from sampler.training.listing import LATENTS, Item, listed, unreadable

if TYPE_CHECKING:
    from sampler.training.session import Session


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


def data_samples(
    session: Session,
    source: str,
    out: Path,
    caption: str | None = None,
    crop: bool = False,
    count: int | None = None,
) -> LatentSet:
    """Read a data set, of which the first `count` images; images are encoded into `out` once.

    caption: of images without one, None refuses them. crop: images of another size are scaled to
    cover the trained one and cropped at the centre, otherwise they are refused.
    Raises UsageError for an unreadable data set.
    """
    stored = Path(source)
    if stored.suffix != LATENTS:
        if not out.is_file():
            _encode(session, listed(source, caption)[:count], out, crop)
        stored = out
    try:
        with safe_open(stored, "pt") as file:
            latents = file.get_tensor("latents").float()
            prompts = _captions_of(file)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise unreadable(source, error) from None
    shape = session.pipeline.latent_shape(*session.size)
    if tuple(latents.shape[1:]) != tuple(shape) or len(latents) != len(prompts):
        raise UsageError(
            f"data = {source} holds {tuple(latents.shape)} latents and {len(prompts)} "
            f"captions; a latent of this run is {tuple(shape)}.",
        )
    return LatentSet(latents[:count], prompts[:count])


def captions(source: str, caption: str | None = None) -> list[str]:
    """Return the captions of a data set, without reading its images. Raises UsageError."""
    if Path(source).suffix != LATENTS:
        return [item.caption for item in listed(source, caption)]
    try:
        with safe_open(source, "pt") as file:
            return list(_captions_of(file))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise unreadable(source, error) from None


def _captions_of(file: Any) -> tuple[str, ...]:
    return tuple(map(str, json.loads((file.metadata() or {})["prompts"])))


def _encode(session: Session, items: Sequence[Item], out: Path, crop: bool) -> None:
    high, wide = session.size
    latents: list[Tensor] = []
    for path, _ in items:
        image = read(path)
        if tuple(image.shape[-2:]) != session.size:
            if not crop:
                raise UsageError(
                    f"{path} is {image.shape[-1]} x {image.shape[-2]} pixels; this run needs "
                    f"{wide} x {high}.",
                )
            image = covering(image, high, wide)
        with torch.no_grad():
            latents.append(session.pipeline.latents_of(image).float().cpu())
    prompts = json.dumps([caption for _, caption in items])
    write_file(out, save({"latents": torch.cat(latents)}, {"prompts": prompts}))


def covering(image: Tensor, high: int, wide: int) -> Tensor:
    """Scale an image [1, 3, H, W] to cover high x wide pixels and crop it at the centre."""
    own_high, own_wide = image.shape[-2:]
    scale = max(high / own_high, wide / own_wide)
    size = (max(high, round(own_high * scale)), max(wide, round(own_wide * scale)))
    scaled = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
    top, left = (size[0] - high) // 2, (size[1] - wide) // 2
    return scaled.clamp(0, 1)[..., top : top + high, left : left + wide]
