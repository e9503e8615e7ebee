"""The stock pipeline on the jobs of a run: its own scheduler and classifier-free guidance."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sampler import registry
from sampler.core.batch import DEFAULT_BATCH, Sample
from sampler.core.errors import UsageError
from sampler.core.images import read
from sampler.core.inputs import IMAGES, planned
from sampler.engine import Engine
from sampler.engine.hosted import HostedEngine
from sampler.engine.hosted_calls import StockCall
from sampler.metrics import ssim
from sampler.pipelines.call_arguments import scheduler_of
from sampler.runs.stop import StopFlag
from sampler.workers.batch_runner import Stopped

Job = tuple[str, str, int]  # prompt, negative prompt, seed


@dataclass(frozen=True)
class StockRun:
    """Images of the stock pipeline. seconds: wall time per image; scheduler: its class."""

    files: Mapping[Job, Path]
    nfe: Sequence[int]
    seconds: float
    scheduler: str
    scale: float

    def similarity(self, records: Sequence[Mapping[str, Any]], folder: Path) -> list[float]:
        """SSIM of each image of a run and the stock one of its prompt and seed, where both are."""
        found: list[float] = []
        for record in records:
            other = self.files.get(job_of(record))
            if other is None or record["file"] is None:
                continue
            if Path(record["file"]).suffix not in IMAGES:
                continue
            a, b = read(folder / record["file"]), read(other)
            if a.shape == b.shape and min(a.shape[2:]) >= 11:
                found.append(float(ssim(a, b)))
        return found


def job_of(record: Mapping[str, Any]) -> Job:
    """Prompt, negative prompt and seed of a record."""
    return record["prompt"], record["negative_prompt"], record["seed"]


@torch.no_grad()
def run_stock(
    engine: Engine, records: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any], scale: float,
    home: Path, stop: StopFlag,
) -> StockRun | None:  # fmt: skip
    """Call the stock pipeline on the prompts and seeds of a run with its number of steps and size.

    None if it was stopped. Raises UsageError for models without a stock call, and for outputs that
    are no images.
    """

    def check() -> None:
        if stop():
            raise Stopped

    hosted: Any = engine.as_hosted()
    inputs = {name: planned(name, value) for name, value in inputs.items()}
    serving: HostedEngine = hosted.serving(inputs)
    first = records[0]
    size = (first["height"] or None, first["width"] or None)
    rule: Any = registry.build("guidance", {"name": "cfg", "scale": scale})
    shared = StockCall(first["steps"], size, serving.sampler, rule)
    folder, files, nfe = Path(tempfile.mkdtemp(dir=home)), dict[Job, Path](), list[int]()
    began = time.monotonic()
    jobs = [Sample(*job_of(record)) for record in records]
    for _, part in itertools.groupby(jobs, lambda job: bool(job.negative)):
        own = [*part]
        for k in range(0, len(own), DEFAULT_BATCH):
            batch = own[k : k + DEFAULT_BATCH]
            try:
                made, counted = serving.calls.call_plain(batch, shared, inputs, check)
            except Stopped:
                return None
            nfe += counted
            for job, image in zip(batch, made, strict=True):
                if not isinstance(image, Image.Image):
                    raise UsageError("The stock pipeline makes no images that can be compared.")
                path = folder / f"{len(files):06d}.png"
                image.save(path)
                files[job.prompt, job.negative, job.seed] = path
    seconds = (time.monotonic() - began) / len(records)
    scheduler = type(scheduler_of(serving.pipeline.pipe)).__name__
    return StockRun(files, nfe, seconds, scheduler, scale)
