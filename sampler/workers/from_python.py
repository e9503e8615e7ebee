"""`engine.generate(..., out=DIR)`: run folders from Python, the same as on the command line."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from PIL import Image

from sampler import registry
from sampler.core.batch import Result
from sampler.core.errors import IncompleteError
from sampler.core.generation import GenerateRequest
from sampler.core.loop import Loop
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import JobSettings
from sampler.runs.lines import INPUT
from sampler.runs.location import RunLocation, open_locked
from sampler.runs.media import WAV, decode_wav, decode_webp
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.settings import RunDefaults, complete_spec
from sampler.runs.start import plan_run, start
from sampler.runs.stop import stop_on_signals
from sampler.workers.execute import execute, raise_for
from sampler.workers.in_memory import model_in_memory
from sampler.workers.work import JournalLines, WorkOptions


class Images(Sequence[Any]):
    """Images of a run, each read from its folder on access; a video is a list of frames."""

    def __init__(self, run: RunFolder, files: Sequence[str]) -> None:
        self._run, self._files = run, files

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        data = self._run.store.read(self._files[index])
        if data is None:
            raise IncompleteError(f"{self._files[index]} is missing; generate again restores it.")
        if self._files[index].endswith(WAV):
            return decode_wav(data)
        if self._files[index].endswith(".webp"):
            return decode_webp(data)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return image.convert("RGBA" if image.mode == "RGBA" else "RGB")

    def __len__(self) -> int:
        return len(self._files)


def generate_into(
    engine: Loop,
    out: str,
    request: GenerateRequest,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Write or resume the run folder `out`; images are read from it lazily.

    Raises the errors of the command line, and ValueError for strategies that cannot be recorded.
    """
    started = time.perf_counter()
    specs = {
        kind: complete_spec(kind, registry.spec_of(strategy))
        for kind, strategy in (("sampler", request.sampler), ("guidance", request.guidance))
    }
    defaults = RunDefaults(JobSettings(request.steps, *request.size, **specs, grid=request.grid))
    planner = Planner(model_in_memory(engine), defaults, request.batch_size)
    lines = (
        RawLine(
            f"image {k}",
            {
                "prompt": str(s.prompt),
                "negative_prompt": s.negative,
                "seed": s.seed,
                **{f"meta_{key}": value for key, value in _metadata(s.prompt).items()},
                **own,
            },
        )
        for k, (s, own) in enumerate(zip(request.samples, _columns(request), strict=True))
    )
    location, options, done = RunLocation(str(out)), WorkOptions(), 0

    def count(number: int) -> None:
        nonlocal done
        done += number

    def on_written(lines: JournalLines) -> None:
        count(len(lines))
        if progress is not None:
            progress(done, run.total)

    with stop_on_signals() as stop, open_locked(location) as store:
        run = start(store, plan_run(planner, lines))
        tally = execute(run, lambda: engine, location, options, stop, on_written, count)
    if tally.stopped:
        raise KeyboardInterrupt
    raise_for(tally, str(out))
    return _result(run, request, specs, str(out), time.perf_counter() - started)


def _metadata(prompt: str) -> Mapping[str, Any]:
    """Metadata of a prompt that has some (`sampler.rewards.base.Prompt`)."""
    return getattr(prompt, "metadata", {})


def _columns(request: GenerateRequest) -> list[dict[str, Any]]:
    """Columns of a prompt file that hold the inputs of each sample."""
    if not request.inputs:
        return [{} for _ in request.samples]
    return [{f"{INPUT}{name}": value for name, value in own.items()} for own in request.inputs]


def _result(
    run: RunFolder, request: GenerateRequest, specs: dict[str, Any], out: str, seconds: float
) -> Result:
    """One entry per sample; equal samples share a file. Raises IncompleteError for failed ones."""
    entries, samples = run.results().entries, request.samples
    shared = dict(run.duplicates)
    index_of = {job.line: job.index for job in run.jobs()}
    found = [entries[run.key(shared.get(k, index_of.get(k, 0)))] for k in range(len(samples))]
    if bad := [entry for entry in found if entry["status"] != "ok"]:
        raise IncompleteError(f"{len(bad)} images failed: {bad[0]['error']['message']}.")
    seeds = [sample.seed for sample in samples]
    config = {
        "prompts": [str(sample.prompt) for sample in samples],
        "negative": [sample.negative for sample in samples],
        "seeds": seeds,
        "n": 1,
        "steps": request.steps,
        "height": request.size[0],
        "width": request.size[1],
        **specs,
        "batch_size": request.batch_size,
        **({} if request.grid is None else {"grid": request.grid}),
        "out": out,
    }
    if any(request.inputs):
        names = request.inputs[0]
        config["inputs"] = {name: [own[name] for own in request.inputs] for name in names}
    images = Images(run, [entry["file"] for entry in found])
    nfe = [entry["nfe"] for entry in found]
    return Result(images, None, seeds, nfe, config, seconds)  # pyright: ignore[reportArgumentType]
