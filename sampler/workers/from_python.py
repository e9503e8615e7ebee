"""`engine.generate(..., out=DIR)`: the run folder of the command line, from Python."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from PIL import Image

from sampler import registry
from sampler.core.batch import Job as PromptLine
from sampler.core.batch import Result
from sampler.core.loop import Loop
from sampler.errors import IncompleteError
from sampler.runs.folder import Facts, RunFolder
from sampler.runs.jobs import JobSettings, Model
from sampler.runs.location import RunLocation, open_locked, stop_on_signals
from sampler.runs.planner import Planner
from sampler.runs.settings import RunDefaults, complete_spec
from sampler.runs.start import start
from sampler.types import Guidance, Sampler
from sampler.workers.execute import Request, execute, outcome


@dataclass(frozen=True)
class GenerateRequest:
    """What `generate` was asked for, resolved."""

    jobs: Sequence[PromptLine]
    size: tuple[int, int]
    steps: int
    sampler: Sampler
    guidance: Guidance
    batch_size: int


class Images(Sequence[Image.Image]):
    """The images of a run, read from its folder when they are looked at."""

    def __init__(self, run: RunFolder, files: Sequence[str]) -> None:
        self._run, self._files = run, files

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        data = self._run.store.read(self._files[index])
        if data is None:
            raise IncompleteError(f"{self._files[index]} has gone; generate again restores it.")
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return image.convert("RGB")

    def __len__(self) -> int:
        return len(self._files)


def generate_into(
    engine: Loop,
    out: str,
    asked: GenerateRequest,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Makes, or goes on with, the run folder `out`; the images are read from it lazily.

    Raises SamplerError with the code of the command line, ValueError for strategies that hold
    what cannot be recorded.
    """
    began = time.perf_counter()
    specs = {
        kind: complete_spec(kind, registry.spec_of(strategy))
        for kind, strategy in (("sampler", asked.sampler), ("guidance", asked.guidance))
    }
    model = model_in_memory(engine)
    defaults = RunDefaults(JobSettings(asked.steps, *asked.size, **specs))
    planner = Planner(model, defaults, asked.batch_size)
    table = [
        (f"image {k}", {"prompt": j.prompt, "negative_prompt": j.negative, "seed": j.seed})
        for k, j in enumerate(asked.jobs)
    ]
    location = RunLocation(str(out))
    with stop_on_signals() as stop, open_locked(location) as store:
        run = start(store, planner, table, False, Facts(model))
        done = [0]

        def told(lines: Sequence[Any]) -> None:
            done[0] += len(lines)
            if progress is not None:
                progress(done[0], run.total)

        tally = execute(
            run, lambda: engine, location, Request(), stop, told, lambda n: done.__setitem__(0, n)
        )
    if tally.stopped:
        raise KeyboardInterrupt
    outcome(tally, str(out))
    return _result(run, asked, specs, str(out), time.perf_counter() - began)


def _result(
    run: RunFolder, asked: GenerateRequest, specs: dict[str, Any], out: str, seconds: float
) -> Result:
    """One entry per row, equal rows sharing a file. Raises SamplerError (3) for failed images."""
    entries = run.results().entries
    shared = dict(run.duplicates)
    index_of = {job.row: job.index for job in run.jobs()}
    found = [entries[run.key(shared.get(k, index_of.get(k, 0)))] for k in range(len(asked.jobs))]
    if bad := [entry for entry in found if entry["status"] != "ok"]:
        raise IncompleteError(f"{len(bad)} images failed: {bad[0]['error']['message']}.")
    config = {
        "prompts": [job.prompt for job in asked.jobs],
        "negative": [job.negative for job in asked.jobs],
        "seeds": [job.seed for job in asked.jobs],
        "n": 1,
        "steps": asked.steps,
        "height": asked.size[0],
        "width": asked.size[1],
        **specs,
        "batch_size": asked.batch_size,
        "out": out,
    }
    images = Images(run, [entry["file"] for entry in found])
    nfe = [entry["nfe"] for entry in found]
    return Result(images, None, config["seeds"], nfe, config, seconds)  # pyright: ignore[reportArgumentType]


def model_in_memory(engine: Loop) -> Model:
    """What identifies the model of an engine: its tensors and configurations, not its files."""
    pipe = engine.pipeline.pipe
    digest = hashlib.sha256()
    for name, part in sorted(getattr(pipe, "components", {}).items()):
        if isinstance(part, torch.nn.Module):
            digest.update(f"\n{name}".encode())
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy())
        elif (config := getattr(part, "config", None)) is not None:
            digest.update(
                f"\n{name} {json.dumps(dict(config), default=str, sort_keys=True)}".encode()
            )
    path = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    label = str(path).rstrip("/").rpartition("/")[2] if path else type(pipe).__name__
    dtype = str(engine.pipeline.dtype).removeprefix("torch.")
    return Model(f"tensors:{digest.hexdigest()}", dtype, label)
