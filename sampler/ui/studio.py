"""One loaded model at work: a configuration becomes a run folder, watched step by step.

What the page shows is a run from the start, in a temporary folder: keeping it copies the folder,
and its images are those of the command line because the same code made them.
"""

from __future__ import annotations

import datetime
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
from sampler.config.schema import STRATEGIES, Config, ModelConfig
from sampler.core.batch import to_output
from sampler.engine import Engine
from sampler.errors import IncompleteError
from sampler.runs.folder import RunFolder
from sampler.runs.location import RunLocation, StopFlag, open_locked
from sampler.runs.names import slug
from sampler.runs.records import records
from sampler.runs.source import Source, check_folder
from sampler.runs.start import start
from sampler.runs.store import open_store
from sampler.types import Prediction, Snapshot, Span
from sampler.ui import export as words
from sampler.workers.execute import Request, execute

LOOK_EVERY = 0.4  # seconds between two looks, at least
LOOK_SHARE = 4  # a look is followed by work of so many times its duration
MOST_LOOKED_AT = 4  # images of a batch that are decoded for a look


@dataclass(frozen=True)
class Look:
    """What the network takes the first images of a batch to be, after `step` of `steps`.

    done: images that are finished already.
    """

    images: Sequence[Image.Image]
    step: int
    steps: int
    done: int


@dataclass(frozen=True)
class Made:
    """A finished run: its folder and configuration, a record per image, and texts that repeat it.

    seconds: wall time per image, without what the looks took.
    """

    folder: Path
    config: Config
    records: Sequence[Mapping[str, Any]]
    seconds: float
    texts: Mapping[str, str]


class Watched(Engine):
    """An engine that shows its guided predictions. told(look), at most as often as the module's
    constants say."""

    def watch(self, told: Callable[[Look], None], done: Callable[[], int]) -> Watched:
        self._told, self._done = told, done
        self.spent, self._next = 0.0, 0.0
        return self

    def predict(
        self, snapshot: Snapshot, span: Span, cond: Any = None, guidance: Any = None
    ) -> tuple[Prediction, Any, tuple[int, ...]]:
        pred, state, nfe = super().predict(snapshot, span, cond, guidance)
        began = time.monotonic()
        if began >= self._next and span.index + 1 < span.total:
            with torch.no_grad():
                x0 = settle(pred.x0)[:MOST_LOOKED_AT]
                images = to_output(self.pipeline.decode(x0).cpu().nan_to_num(0.5), "pil")
            self._told(Look(images, span.index + 1, span.total, self._done()))
            took = time.monotonic() - began
            self.spent += took
            self._next = began + took + max(LOOK_EVERY, LOOK_SHARE * took)
        return pred, state, nfe


class Studio:
    """Makes and keeps runs of one model. out: where runs are kept; home: the temporary place."""

    def __init__(self, engine: Engine, model: ModelConfig, out: Path, home: Path) -> None:
        check_folder(str(out))
        self.engine, self.config, self.out, self.home = engine, model, out, home
        self.model = Source(Config(model=model)).model()
        self.defaults = {kind: registry.spec_of(getattr(engine, kind)) for kind in STRATEGIES}
        self._busy = threading.Lock()

    def make(self, config: Config, told: Callable[[Look], None], stop: StopFlag) -> Made | None:
        """The run of a configuration; None where it was told to stop.

        Raises SamplerError and ValueError as `sampler generate` does, (3) where no image came out.
        """
        source = Source(config)
        folder = Path(tempfile.mkdtemp(dir=self.home))
        location = RunLocation(str(folder), fsync=False)
        done = [0]

        def written(lines: Sequence[Any]) -> None:
            done[0] += len(lines)

        with self._busy, open_locked(location) as store:
            planner = source.planner(self.model)
            run = start(store, planner, source.rows(), source.is_text, source.facts(self.model))
            own = Watched(
                self.engine.denoiser,
                self.engine.pipeline,
                self.engine.sampler,
                self.engine.guidance,
            ).watch(told, lambda: done[0])
            began = time.monotonic()
            tally = execute(run, lambda: own, location, Request(), stop, written)
            seconds = (time.monotonic() - began - own.spent) / run.total
        if tally.stopped:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        found = list(records(run))
        if not tally.done:
            raise IncompleteError(f"No image was made: {found[0]['error']}.")
        return Made(folder, config, found, seconds, texts_of(run, config))

    def forget(self, made: Made) -> None:
        """Removes a run that is shown no longer from the temporary place."""
        shutil.rmtree(made.folder, ignore_errors=True)

    def keep(self, made: Made) -> Path:
        """Copies a run to where runs are kept, and names the folder: date, first prompt, plan.

        One that was kept before stays as it is. Raises OSError, SamplerError (5).
        """
        check_folder(str(self.out))
        plan = RunFolder(open_store(str(made.folder))).hash
        name = f"{slug((made.config.prompts.texts or ('',))[0], 24)}-{plan[:8]}"
        if known := sorted(self.out.glob(f"*-{name}")):
            return known[-1]
        folder = self.out / f"{datetime.date.today().isoformat()}-{name}"
        self.out.mkdir(parents=True, exist_ok=True)
        # Under another name first: a copy that is cut short is no run folder.
        part = Path(tempfile.mkdtemp(prefix=".keep-", dir=self.out))
        try:
            shutil.copytree(made.folder, part / "run", ignore=shutil.ignore_patterns(".lock"))
            (part / "run").rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return folder


def texts_of(run: RunFolder, config: Config) -> dict[str, str]:
    """What makes the images of a run again: a command line, a configuration, a program."""
    largest = max(len(batch.jobs) for batch in run.batches)
    seeds = [job.seed for job in run.jobs()]
    return {
        "Command line": words.shell(config),
        "YAML": words.yaml(config),
        "Python": words.python(config, seeds, largest),
    }
