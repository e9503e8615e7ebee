"""Runs of the playground: a loaded model, run folders in a temporary place, live previews.

Every result on the page is a complete run folder; saving copies the folder. Its images equal those
of the command line because the same code generates them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sampler_kernels import settle

from sampler import registry
from sampler.config.model import ModelConfig
from sampler.config.schema import STRATEGIES, Config
from sampler.core import durable
from sampler.core.batch import to_output
from sampler.core.errors import IncompleteError
from sampler.core.image_files import open_image
from sampler.engine import Engine
from sampler.models.ip_adapter import has_ip_adapter
from sampler.pipelines.call_arguments import arguments
from sampler.pipelines.serving import image_input, serving_class
from sampler.runs.folder import RunFolder
from sampler.runs.location import RunLocation, check_writable, default_folder, open_locked
from sampler.runs.records import records
from sampler.runs.source import Source
from sampler.runs.start import start
from sampler.runs.stop import StopFlag
from sampler.runs.store import open_store
from sampler.types import Prediction, Snapshot, Span
from sampler.ui import export
from sampler.workers.execute import execute
from sampler.workers.work import WorkOptions

PREVIEW_SECONDS = 0.4  # minimum between two previews
PREVIEW_SHARE = 4  # minimum ratio of sampling time to preview time
MAX_PREVIEWS = 4  # images decoded per preview


def second_rule(first: Mapping[str, Any]) -> dict[str, Any]:
    """The rule that side B starts with: another one than side A's, at the same scale."""
    if first["name"] == "apg":
        return {"name": "none"}
    scale = first.get("scale") if first["name"] == "cfg" else None
    return {"name": "apg"} if scale is None else {"name": "apg", "scale": scale}


@dataclass(frozen=True)
class Preview:
    """Predicted clean images of the first samples of a batch after `step` of `steps`.

    done: number of finished images.
    """

    images: Sequence[Image.Image]
    step: int
    steps: int
    done: int


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: folder, configuration, one record per image, exports that reproduce it.

    seconds: wall time per image without the previews.
    """

    folder: Path
    config: Config
    records: Sequence[Mapping[str, Any]]
    seconds: float
    exports: Mapping[str, str]


class PreviewEngine(Engine):
    """An engine that reports its guided predictions, at most as often as the constants above."""

    def preview(
        self, on_preview: Callable[[Preview], None], done: Callable[[], int]
    ) -> PreviewEngine:
        self._on_preview, self._done = on_preview, done
        self.spent, self._next = 0.0, 0.0
        return self

    def predict(
        self, snapshot: Snapshot, span: Span, cond: Any = None, guidance: Any = None
    ) -> tuple[Prediction, Any, tuple[int, ...]]:
        pred, state, nfe = super().predict(snapshot, span, cond, guidance)
        began = time.monotonic()
        if began >= self._next and span.index + 1 < span.total:
            with torch.no_grad():
                x0 = settle(pred.x0)[:MAX_PREVIEWS]
                images = to_output(self.pipeline.decode(x0).cpu().nan_to_num(0.5), "pil")
            self._on_preview(Preview(images, span.index + 1, span.total, self._done()))
            took = time.monotonic() - began
            self.spent += took
            self._next = began + took + max(PREVIEW_SECONDS, PREVIEW_SHARE * took)
        return pred, state, nfe


class Studio:
    """Runs of one model. out: folder of saved runs; home: temporary folder of the others.

    image_input: name of the image that the pipeline's call takes, None without one.
    """

    def __init__(self, engine: Engine, model: ModelConfig, out: Path, home: Path) -> None:
        check_writable(str(out))
        self.engine, self.config, self.out, self.home = engine, model, out, home
        self.model = Source(Config(model=model)).model()
        self.defaults = {kind: registry.spec_of(getattr(engine, kind)) for kind in STRATEGIES}
        self._busy = threading.Lock()
        takes = engine.hosted or engine.host is not None
        pipe: Any = engine.pipeline.pipe
        prompted = takes and has_ip_adapter(pipe)
        self.image_input = image_input(type(pipe)) if takes else None
        self.image_input = "ip_adapter_image" if prompted else self.image_input
        self.takes_strength = self.image_input == "image" and "strength" in arguments(
            serving_class(type(pipe), ["image"])
        )

    def kept(self, image: str) -> str:
        """Copy an uploaded image below the saved runs, where they and copied commands find it.

        Raises UsageError for a file that is no image, and StorageError.
        """
        with open_image(image) as file:
            suffix = f".{str(file.format).lower()}"
        data = Path(image).read_bytes()
        path = self.out / "inputs" / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        if not path.exists():
            durable.make_folder(path.parent)
            durable.write_file(path, data)
        return str(path.resolve())

    def run(
        self, config: Config, on_preview: Callable[[Preview], None], stop: StopFlag
    ) -> FinishedRun | None:
        """Run a configuration; None if it was stopped.

        Raises SamplerError and ValueError as `sampler generate` does, and IncompleteError if every
        image failed.
        """
        source = Source(config)
        folder = Path(tempfile.mkdtemp(dir=self.home))
        location = RunLocation(str(folder), fsync=False)
        done = [0]

        def written(lines: Sequence[Any]) -> None:
            done[0] += len(lines)

        with self._busy, open_locked(location) as store:
            run = start(store, source.plan(self.model))
            engine = self.engine  # the stock pipeline's own call shows no previews
            if not (engine.hosted or config.inputs):
                engine = PreviewEngine(
                    engine.denoiser, engine.pipeline, engine.sampler, engine.guidance
                ).preview(on_preview, lambda: done[0])
            began = time.monotonic()
            tally = execute(run, lambda: engine, location, WorkOptions(), stop, written)
            spent = engine.spent if isinstance(engine, PreviewEngine) else 0.0
            seconds = (time.monotonic() - began - spent) / run.total
        if tally.stopped:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        found = list(records(run))
        if not tally.done:
            raise IncompleteError(f"No image was generated: {reason(found[0]['error'])}.")
        return FinishedRun(folder, config, found, seconds, exports_of(run, config))

    def discard(self, run: FinishedRun) -> None:
        """Remove a run from the temporary folder."""
        shutil.rmtree(run.folder, ignore_errors=True)

    def save(self, run: FinishedRun) -> Path:
        """Copy a run to the saved runs, as date, first prompt and plan hash; return its folder.

        A run that was saved before is not copied again. Raises OSError and StorageError.
        """
        check_writable(str(self.out))
        plan = RunFolder(open_store(str(run.folder))).hash
        folder = default_folder((run.config.prompts.texts or ("",))[0], plan, self.out)
        if not folder.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            ignore = shutil.ignore_patterns(".lock")
            with durable.write_folder(folder) as part:
                shutil.copytree(run.folder, part, ignore=ignore, dirs_exist_ok=True)
        return folder


def reason(error: str) -> str:
    """What a record says of a failure, without the class of the exception."""
    return re.sub(r"^exception: \w+: ", "", error).rstrip(".")


def exports_of(run: RunFolder, config: Config) -> dict[str, str]:
    """Command line, configuration file and program that reproduce a run."""
    largest = max(len(batch.jobs) for batch in run.batches)
    seeds = [job.seed for job in run.jobs()]
    return {
        "Command line": export.shell(config),
        "YAML": export.yaml(config),
        "Python": export.python(config, seeds, largest),
    }
