"""Scores of a set of images, read from the cache or computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sampler.core.errors import UsageError
from sampler.core.images import read
from sampler.evaluation.features import Extractor, SetMeasure, by_cluster, finite
from sampler.evaluation.parse import Scorer
from sampler.evaluation.pictures import Picture, PictureSet
from sampler.evaluation.score_files import ScoreFile, image_key
from sampler.evaluation.scorers import ImageScorer
from sampler.rewards.base import Prompt
from sampler.rewards.scoring import NonFiniteScore

CHUNK = 16  # images that are scored together; fixed, since networks round by batch

Progress = Callable[[int, int], None]


@dataclass
class Scored:
    """Scores of a set.

    images: by column, one number per image, NaN for one that has none; weights: by column, those of
    prompts in its mean, where they are not equal; prompts: by measure, {prompt: value}; sets: one
    number per measure of the whole set, None where it has too few images; fingerprints: of the
    scorers; measured: rows that measures of prompts and sets are of, all where it is empty.
    """

    source: PictureSet
    images: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    prompts: dict[str, dict[str, float]] = field(default_factory=dict)
    sets: dict[str, float | None] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    measured: Sequence[int] = ()


@torch.no_grad()
def score_set(
    source: PictureSet,
    scorers: Sequence[Scorer],
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
    measured: Sequence[int] = (),
) -> Scored:
    """Score all images of a set; folder keeps the scores; measured: as in `Scored`.

    Chunks of 16 images in the order of prompts and seeds go through a scorer together, always
    whole: a score does not depend on where an earlier evaluation was stopped.
    Raises UsageError for a scorer that reads prompts and images without one.
    """
    found = Scored(source, measured=measured)
    own = [s for s in scorers if isinstance(s, ImageScorer)]
    unknown = [p.name for p in source.pictures if p.prompt is None]
    for scorer in own:
        if scorer.reads_prompt and unknown:
            raise UsageError(
                f"The scorer {scorer.label!r} reads prompts, and {unknown[0]} has none: "
                'put metadata.jsonl with {"file_name": ..., "prompt": ...} beside the images, or '
                "leave the scorer out."
            )
    for scorer in scorers:
        scorer.check()
    for scorer in own:
        found.fingerprints[scorer.label] = scorer.fingerprint
        file = ScoreFile(folder if scorer.kept else None, scorer.label, scorer.fingerprint)
        keys = [image_key(p.digest, p.prompt, p.meta) for p in source.pictures]
        for first in range(0, len(keys), CHUNK):
            rows = range(first, min(first + CHUNK, len(keys)))
            if not all(keys[row] in file.known for row in rows):
                file.add(_chunk(scorer, [source.pictures[r] for r in rows], keys[first:]))
            progress(rows.stop, len(keys))
        found.weights |= scorer.weights(source.prompts)
        for name in dict.fromkeys(name for key in keys for name in file.known[key]):
            found.images[name] = [file.known[key].get(name, math.nan) for key in keys]
    measures = [s for s in scorers if isinstance(s, SetMeasure)]
    for extractor in dict.fromkeys(m.extractor for m in measures):
        chosen = [m for m in measures if m.extractor == extractor]
        _measure(found, extractor, chosen)
    return found


def _chunk(
    scorer: ImageScorer, pictures: Sequence[Picture], keys: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Scores of consecutive images by key; those of one size together."""
    scores: dict[str, dict[str, float]] = {}
    rows = iter(keys)
    for part, images in batches(pictures):
        columns = _columns(scorer, part, images)
        for b, key in zip(range(len(part)), rows, strict=False):
            own = {name: float(values[b]) for name, values in columns.items()}
            scores[key] = {name: value for name, value in own.items() if math.isfinite(value)}
    return scores


def _columns(scorer: ImageScorer, part: Sequence[Picture], images: Tensor) -> dict[str, Tensor]:
    """Scores of images of one size; errors name the files."""
    try:
        return scorer.columns(images, [Prompt(p.prompt or "", _metadata(p)) for p in part])
    except NonFiniteScore as error:
        names = ", ".join(part[row].name for row in error.rows[:3])
        raise NonFiniteScore(f"{names}: {error}", error.rows) from None
    except ValueError as error:
        names = " to ".join(dict.fromkeys([part[0].name, part[-1].name]))
        raise UsageError(f"{names}: {error}") from None


def _metadata(picture: Picture) -> dict[str, object]:
    return {key.removeprefix("meta_"): value for key, value in picture.meta.items()}


def batches(pictures: Sequence[Picture]) -> Iterator[tuple[list[Picture], Tensor]]:
    """Read images and yield runs of equal size as [B, 3, H, W] in [0, 1]."""
    loaded = [(picture, read(picture.read(), picture.name, on_white=True)) for picture in pictures]
    for _, group in itertools.groupby(loaded, key=lambda one: one[1].shape):
        part = list(group)
        yield [picture for picture, _ in part], torch.cat([image for _, image in part])


def _measure(found: Scored, extractor: Extractor, measures: Sequence[SetMeasure]) -> None:
    """Compute measures of one feature space."""
    pictures = found.source.pictures
    rows = [*(found.measured or range(len(pictures)))]
    clusters = [pictures[row].cluster for row in rows]
    repeated = len(set(clusters)) < len(clusters)
    wanted = [m for m in measures if repeated or not m.by_prompt]
    if not wanted:
        return
    chunks = (pictures[k : k + CHUNK] for k in range(0, len(pictures), CHUNK))
    features = torch.cat([extractor(images) for part in chunks for _, images in batches(part)])
    features = features[rows]
    for measure in wanted:
        found.fingerprints[measure.label] = measure.fingerprint()
        if measure.by_prompt:
            names, values = by_cluster(measure, clusters, features)
            found.prompts[measure.label] = dict(zip(names, values, strict=True))
        else:
            enough = len(rows) >= measure.smallest
            found.sets[measure.label] = finite(measure.function(features)) if enough else None
