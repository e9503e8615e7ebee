"""`sampler.evaluate`: scores of finished images, alone or against those of another setting."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sampler.core.durable import make_folder
from sampler.evaluation.compare import DRIFT, equal_numbers, rows_of, shared, twins
from sampler.evaluation.features import FEW, SetMeasure
from sampler.evaluation.parse import Scorer, scorers_from, with_standard_scorers
from sampler.evaluation.pictures import PictureSet, open_pictures
from sampler.evaluation.scoring import Scored, score_set
from sampler.evaluation.table import Evaluation

FEW_PROMPTS = 20  # below, the percentile interval of normal data covers less than 93 %


def evaluate(
    images: str | Path,
    scorers: Any = (),
    *,
    against: str | Path | None = None,
    out: str | Path | None = None,
    allow_python: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score finished images, with 95 % intervals by bootstrap over prompts.

    images: a run folder or its URL, or any folder of PNG, JPEG and WebP files. There, prompts and
        seeds are read from metadata.jsonl ({"file_name", "prompt", "seed"}), NAME.txt beside an
        image, or the texts that generators embed; scorers that read prompts need them.
    scorers: names (of rewards, "judge", "frechet:reference=FOLDER", ...), mappings, rewards, or
        functions (images, prompts) -> scores. Saturation, clipped values, sharpness and, with
        several images per prompt, diversity are always added.
    against: images of another setting; the paired difference of both is reported, over what they
        share: images of equal prompt and seed, or else equal prompts.
    out: folder for eval.md, eval.json, eval.csv and scores; by default the run folder, and none for
        a folder of other images.
    progress: called as progress(images scored, images) while scorers run.

    The mean of a score is over prompts, of the mean of each prompt's images. The same call gives
    the same bytes; known scores of images are read from the cache, those of functions are not.

    Raises UsageError (2) for images and scorers that do not fit, ModelError (6) for missing
    weights.
    """
    several = isinstance(scorers, (list, tuple))
    given = scorers_from(scorers if several else [scorers], allow_python)
    chosen, tick = with_standard_scorers(given), progress or (lambda done, total: None)
    first = open_pictures(images)
    second = None if against is None else open_pictures(against)
    measured: tuple[list[int], list[int]] = [], []
    if second is not None:
        measured = equal_numbers(first.pictures, second.pictures)
    keep = first.folder if out is None else Path(out).expanduser()
    if keep is not None:
        make_folder(keep)
    scored = score_set(first, chosen, keep, tick, measured[0])
    other = None
    if second is not None:
        other = score_set(second, chosen, second.folder, tick, measured[1])
    rows = rows_of(scored, other)
    notes = [*first.notes, *(second.notes if second else ())]
    named = [scorer.label for scorer in given]
    notes += [note for side in (scored, other) if side for note in _unscored(side, chosen, named)]
    count = len(scored.measured or first.pictures)
    if scored.sets and count < FEW:
        notes.append(
            f"distances of sets are biased below {FEW:,} images: compare them at equal numbers, "
            f"here {count}"
        )
    few = min((row.prompts for row in rows if row.interval is not None), default=FEW_PROMPTS)
    if few < FEW_PROMPTS:
        notes.append(f"intervals over fewer than {FEW_PROMPTS} prompts are too narrow, here {few}")
    if second is not None:
        drift = next((row.images for row in rows if row.scorer == DRIFT), 0)
        notes += [*_unpaired(first, second), *_without_drift(first, second, drift)]
    facts = {**_facts(first), "scorers": scored.fingerprints}
    if second is not None:
        facts["against"] = _facts(second)
    found = Evaluation(facts, rows, notes, scored)
    if keep is not None:
        found.write(keep)
    return found


def _facts(source: PictureSet) -> dict[str, Any]:
    """Settings that the images were generated with, without places and times."""
    prompts = "\n".join(source.prompts)
    nfe = [p.nfe for p in source.pictures if p.nfe is not None]
    ms = [p.ms for p in source.pictures if p.ms is not None]
    facts = {
        **source.facts,
        "images": len(source.pictures),
        "prompts": len(source.prompts),
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
    }
    if nfe:
        facts["nfe_per_image"] = sum(nfe) / len(nfe)
    if ms:
        facts["seconds_per_image"] = sum(ms) / len(ms) / 1000
    return facts


def _unscored(scored: Scored, scorers: Sequence[Scorer], named: Sequence[str]) -> list[str]:
    """Notes on images without a score, and on measures without a value.

    named: labels of the scorers that were asked for.
    """
    source, notes = scored.source, []
    for name, values in scored.images.items():
        if name not in scored.weights and (lacking := sum(not math.isfinite(v) for v in values)):
            part = f"{lacking} of {len(values)} images of {source.where}"
            notes.append(f"{part} have no score of {name}")
    for scorer in scorers:
        label = scorer.label
        if isinstance(scorer, SetMeasure) and scorer.by_prompt:
            if label in named and not scored.prompts.get(label):
                notes.append(f"{label} needs several images of a prompt; {source.where} has none")
        elif isinstance(scorer, SetMeasure):
            if len(scored.measured or source.pictures) < scorer.smallest:
                notes.append(f"{label} needs at least {scorer.smallest} images")
            elif scored.sets[label] is None:
                notes.append(f"{label} is not finite for {source.where}")
        elif label not in scored.images:
            notes.append(f"no image of {source.where} has a score of {label}")
    return notes


def _unpaired(first: PictureSet, second: PictureSet) -> list[str]:
    """Notes on images that have no partner in the other set."""
    notes = []
    sides, kept = (first, second), shared(first.pictures, second.pictures)
    for side, rows, other in zip(sides, kept, reversed(sides), strict=True):
        if left := len(side.pictures) - len(rows):
            notes.append(
                f"{left} of {len(side.pictures)} images of {side.where} have no partner in "
                f"{other.where}"
            )
    if not {p.pair for p in first.pictures} & {p.pair for p in second.pictures}:
        notes.append("no seed is shared, so that pairs are prompts and intervals are wider")
    return notes


def _without_drift(first: PictureSet, second: PictureSet, images: int) -> list[str]:
    """Note on pairs of images whose pixels cannot be compared; images: those with a drift."""
    pairs = len(twins(first.pictures, second.pictures))
    if pairs == images:
        return []
    return [f"{pairs - images} of {pairs} pairs of images have no drift, since their sizes differ"]
