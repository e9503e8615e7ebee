"""`sampler.evaluate`: scores of finished images, alone or against those of another setting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sampler.core.durable import make_folder
from sampler.evaluation.compare import rows_of
from sampler.evaluation.features import FEW
from sampler.evaluation.parse import scorers_from, with_standard_scorers
from sampler.evaluation.pictures import PictureSet, open_pictures
from sampler.evaluation.scoring import score_set
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
    against: images of another setting; the paired difference of both is reported.
    out: folder for eval.md, eval.json, eval.csv and scores; by default the run folder, and none for
        a folder of other images.
    progress: called as progress(images scored, images) while scorers run.

    The mean of a score is over prompts, of the mean of each prompt's images. The same call gives
    the same bytes; known scores of images are read from the cache.

    Raises UsageError (2) for images and scorers that do not fit, ModelError (6) for missing
    weights.
    """
    several = isinstance(scorers, (list, tuple))
    given = scorers_from(scorers if several else [scorers], allow_python)
    chosen, tick = with_standard_scorers(given), progress or (lambda done, total: None)
    first = open_pictures(images)
    second = None if against is None else open_pictures(against)
    keep = first.folder if out is None else Path(out).expanduser()
    if keep is not None:
        make_folder(keep)
    scored = score_set(first, chosen, keep, tick)
    other = None if second is None else score_set(second, chosen, second.folder, tick)
    rows = rows_of(scored, other)
    notes = [*first.notes, *(second.notes if second else ())]
    if scored.sets and len(first.pictures) < FEW:
        notes.append(
            f"distances of sets are biased below {FEW:,} images: compare them at equal numbers, "
            f"here {len(first.pictures)}"
        )
    if rows[0].prompts < FEW_PROMPTS:
        few = rows[0].prompts
        notes.append(f"intervals over fewer than {FEW_PROMPTS} prompts are too narrow, here {few}")
    if second is not None:
        notes += _unpaired(first, second, rows[0].images)
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


def _unpaired(first: PictureSet, second: PictureSet, kept: int) -> list[str]:
    """Notes on images that have no partner in the other set."""
    notes = []
    if left := len(first.pictures) - kept:
        notes.append(f"{left} of {len(first.pictures)} images have no partner in {second.where}")
    seeds = {(p.cluster, p.seed) for p in first.pictures}
    if not any((p.cluster, p.seed) in seeds for p in second.pictures):
        notes.append("no seed is shared, so that pairs are prompts and intervals are wider")
    return notes
