"""Runs of the playground: a loaded model, and run folders in a temporary place.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sampler import registry
from sampler.config.model import ModelConfig
from sampler.config.schema import STRATEGIES, Config
from sampler.core import durable
from sampler.core.errors import IncompleteError
from sampler.core.image_files import open_image
from sampler.core.inputs import VIDEOS
from sampler.engine import Engine
from sampler.evaluation import best_of
from sampler.evaluation.best_of import BestOf
from sampler.runs.folder import RunFolder
from sampler.runs.location import RunLocation, check_writable, default_folder, open_locked
from sampler.runs.records import records
from sampler.runs.source import Source
from sampler.runs.start import start
from sampler.runs.stop import StopFlag
from sampler.runs.store import open_store
from sampler.ui import export
from sampler.ui.inputs import takes_of
from sampler.ui.previews import Preview, PreviewEngine
from sampler.ui.stock import StockRun, run_stock
from sampler.workers.best_of import DRAFTS
from sampler.workers.execute import execute
from sampler.workers.work import WorkOptions

Records = Sequence[Mapping[str, Any]]


def second_rule(first: Mapping[str, Any]) -> dict[str, Any]:
    """The rule that side B starts with: another one than side A's, at the same scale."""
    if first["name"] == "apg":
        return {"name": "none"}
    scale = first.get("scale") if first["name"] == "cfg" else None
    return {"name": "apg"} if scale is None else {"name": "apg", "scale": scale}


@dataclass(frozen=True)
class Drafts:
    """Drafts that the images of a run were chosen from.

    records: of all drafts; choices: of each prompt, as best_of.json has them; seconds: per draft.
    """

    records: Records
    choices: Records
    seconds: float


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: folder, configuration, one record per image, exports that reproduce it.

    seconds: wall time per image without the previews; notes: what its settings leave unused.
    """

    folder: Path
    config: Config
    records: Records
    seconds: float
    exports: Mapping[str, str]
    notes: Sequence[str] = ()
    drafts: Drafts | None = None


class _Made(NamedTuple):
    """A finished plan, its records, and its wall time per image without the previews."""

    run: RunFolder
    records: Records
    seconds: float


class Studio:
    """Runs of one model. out: folder of saved runs; home: temporary folder of the others.

    takes: what the pipeline's call takes; busy: held while the model is used.
    """

    def __init__(self, engine: Engine, model: ModelConfig, out: Path, home: Path) -> None:
        check_writable(str(out))
        self.engine, self.config, self.out, self.home = engine, model, out, home
        self.model = Source(Config(model=model)).model()
        self.defaults = {kind: registry.spec_of(getattr(engine, kind)) for kind in STRATEGIES}
        self.takes = takes_of(engine)
        self.busy = threading.Lock()

    def kept(self, file: str) -> str:
        """Copy an uploaded file below the saved runs, where they and copied commands find it.

        Raises UsageError for a file that is no image or video, and StorageError.
        """
        suffix = Path(file).suffix.lower()
        if suffix not in VIDEOS:
            with open_image(file) as image:
                suffix = f".{str(image.format).lower()}"
        data = Path(file).read_bytes()
        path = self.out / "inputs" / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        if not path.exists():
            durable.make_folder(path.parent)
            durable.write_file(path, data)
        return str(path.resolve())

    def run(
        self,
        config: Config,
        on_preview: Callable[[Preview], None],
        stop: StopFlag,
        best: BestOf | None = None,
    ) -> FinishedRun | None:
        """Run a configuration; None if it was stopped.

        best: draft candidates first, and run the best of them. Raises SamplerError and ValueError
        as `sampler generate` does, and IncompleteError if every image failed.
        """
        folder = Path(tempfile.mkdtemp(dir=self.home))
        source = plan = Source(config)
        drafts, chosen = None, []
        with self.busy:
            if best is not None:
                source = replace(source, lines=[*source.read_lines()])
                inner = str(folder / DRAFTS)
                drafts = self._made(best_of.drafts_of(source, best, inner), inner, on_preview, stop)
                if drafts is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    return None
                chosen = best_of.choices_of(source, best, inner)
                plan = best_of.finals_of(source, best, chosen)
            made = self._made(plan, str(folder), on_preview, stop)
        if made is None:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        runs = [made.run] if drafts is None else [drafts.run, made.run]
        notes = tuple(dict.fromkeys(plan.notes))
        exports = exports_of(runs, config, best)
        done = FinishedRun(folder, config, made.records, made.seconds, exports, notes)
        if best is None or drafts is None:
            return done
        choices = best_of.records_of(source, str(folder), best, chosen)
        return replace(done, drafts=Drafts(drafts.records, choices, drafts.seconds))

    def run_stock(self, run: FinishedRun, scale: float, stop: StopFlag) -> StockRun | None:
        """Call the stock pipeline on the images of a run; see `sampler.ui.stock`."""
        done = [record for record in run.records if record["file"] is not None]
        with self.busy:
            return run_stock(self.engine, done, run.config.inputs, scale, self.home, stop)

    def _made(
        self, source: Source, where: str, on_preview: Callable[[Preview], None], stop: StopFlag
    ) -> _Made | None:
        """Execute a plan; None if it was stopped. Raises IncompleteError if every image failed."""
        location, done = RunLocation(where, fsync=False), [0]

        def written(lines: Sequence[Any]) -> None:
            done[0] += len(lines)

        with open_locked(location) as store:
            run = start(store, source.plan(self.model))
            engine = self.engine  # the stock pipeline's own call shows no previews
            if not (engine.hosted or source.config.inputs or engine.pipeline.frames is not None):
                engine = PreviewEngine(
                    engine.denoiser, engine.pipeline, engine.sampler, engine.guidance
                ).preview(on_preview, lambda: done[0], run.total)
            began = time.monotonic()
            tally = execute(run, lambda: engine, location, WorkOptions(), stop, written)
            spent = engine.spent if isinstance(engine, PreviewEngine) else 0.0
            seconds = (time.monotonic() - began - spent) / run.total
        if tally.stopped:
            return None
        found = [*records(run)]
        if not tally.done:
            raise IncompleteError(f"No image was generated: {reason(found[0]['error'])}.")
        return _Made(run, found, seconds)

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
    """The message of a failure in a record, without the class of the exception."""
    return re.sub(r"^exception: \w+: ", "", error).rstrip(".")


def exports_of(runs: Sequence[RunFolder], config: Config, best: BestOf | None) -> dict[str, str]:
    """Command line, configuration file and program that reproduce a run; runs: drafts first."""
    largest = max(len(batch.jobs) for run in runs for batch in run.batches)
    seeds = [job.seed for job in runs[0].jobs()]
    return {
        "Command line": export.shell(config, best),
        "YAML": export.yaml(config, best),
        "Python": export.python(config, seeds, largest, best),
    }
