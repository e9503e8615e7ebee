"""What a run is planned from: a configuration, the prompts, the axes of a sweep."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sampler.config.schema import STRATEGIES, Config
from sampler.errors import StorageError, UsageError
from sampler.model_files.folder import default_strategies
from sampler.runs import axes, fingerprint, tables
from sampler.runs.folder import Facts, Output
from sampler.runs.jobs import JobSettings, Model
from sampler.runs.names import check_template, slug
from sampler.runs.planner import Planner
from sampler.runs.settings import RunDefaults, complete_spec
from sampler.runs.wildcards import Wildcards


@dataclass(frozen=True)
class Source:
    """What a run is planned from: a configuration, prompts of the command line, axes of a sweep.

    defaults: the model's own sampler and guidance, where only the loaded model can tell them.
    """

    config: Config
    texts: Sequence[str] = ()
    axes: Sequence[axes.Axis] = ()
    fast: bool = False
    buffered: Sequence[tables.Line] | None = None
    defaults: Mapping[str, Any] | None = None
    skipped: list[str] = field(default_factory=list[str])

    def rows(self) -> Iterator[tables.Line]:
        """Arguments first, then the file; without arguments, those of the configuration."""
        if self.buffered is not None:
            return iter(self.buffered)
        prompts = self.config.prompts
        texts = self.texts or (() if prompts.file else prompts.texts or ())
        lines: Iterator[tables.Line] = (
            (f"prompt {k}", {"prompt": text}) for k, text in enumerate(texts, 1)
        )
        if prompts.file is not None:
            lines = itertools.chain(lines, tables.read_table(prompts.file, prompts.format))
        return axes.sweep(lines, list(self.axes)) if self.axes else lines

    @property
    def is_text(self) -> bool:
        """Whether cells are text, to be read as numbers where due."""
        file, kind = self.config.prompts.file, self.config.prompts.format
        kind = kind or Path(file or "x.txt").suffix.lstrip(".").lower() or "txt"
        return tables.is_text(kind)

    def model(self) -> Model:
        """What identifies the model; its files are hashed, not loaded. SamplerError (6)."""
        model = self.config.model
        found = fingerprint.model_of(model.path, model.revision, model.dtype, self.fast)
        return fingerprint.with_lora(found, model.lora, model.student)

    def planner(self, model: Model) -> Planner:
        """What makes jobs of the rows. Raises SamplerError (2) for a strategy that is wrong."""
        config, run = self.config, self.config.run
        try:
            whole = {kind: complete_spec(kind, self._spec(kind)) for kind in STRATEGIES}
        except ValueError as error:
            raise UsageError(str(error)) from None
        defaults = RunDefaults(
            JobSettings(run.steps, run.height, run.width, **whole),
            run.negative_prompt or "",
            run.seed if run.seed is not None or not self.axes else 0,
            run.n,
            limits=config.limits,
        )
        prompts = config.prompts
        folder = Path(prompts.wildcards) if prompts.wildcards else None
        skip = prompts.on_bad_row == "skip"
        return Planner(
            model,
            defaults,
            run.batch_size,
            dedupe=run.dedupe,
            expand=prompts.expand,
            wildcards=Wildcards(folder),
            skipped=(lambda error: self.skipped.append(str(error))) if skip else None,
        )

    def named(self) -> bool:
        """Whether sampler and guidance are given by name, so that no default is needed."""
        given = [getattr(self.config, kind) for kind in STRATEGIES]
        return all(isinstance(spec, str) or (spec and "name" in spec) for spec in given)

    def _spec(self, kind: str) -> Any:
        """The run's strategy: as given, or the model's own with the fields that are given."""
        given = getattr(self.config, kind)
        if isinstance(given, str) or (given and "name" in given):
            return given
        model = self.config.model
        known = self.defaults or default_strategies(model.path, model.revision)
        if known is None:
            raise UsageError(
                f"What the default {kind} of {model.path} is, is known only when it is loaded; "
                f"name one with --{kind}.",
            )
        return {**known[kind], **(given or {})}

    def facts(self, model: Model) -> Facts:
        output = self.config.output
        if output.name_template is not None:
            check_template(output.name_template)
        kept = Output(output.metadata, output.name_template, output.flagged)
        plain: dict[str, Any] = {
            name: asdict(getattr(self.config, name)) for name in ("model", "output", "errors")
        }
        plain["axes"] = [asdict(axis) for axis in self.axes]
        return Facts(model, kept, plain)


def folder_of(source: Source, model: Model, new: bool) -> str:
    """The run folder: as asked for, or below runs/ with date, first prompt and plan in its name.

    new: one that is not there yet.
    """
    given = source.config.output.dir
    if given is None:
        planner = source.planner(model)
        jobs = planner.jobs(source.rows(), source.is_text)
        prompt = next(jobs).prompt
        for _ in jobs:  # the plan's hash is known at the end
            pass
        name = f"{slug(prompt, 24)}-{planner.plan.hash[:4]}"
        found = sorted(Path("runs").glob(f"*-{name}"))
        if found and not new:
            return str(found[-1])
        given = str(Path("runs") / f"{datetime.date.today().isoformat()}-{name}")
    if not new:
        return given
    candidates = itertools.chain([given], (f"{given}-{k}" for k in itertools.count(2)))
    return next(path for path in candidates if not Path(path).exists())


def check_folder(where: str) -> None:
    """Refuses, before anything is computed, a place where no image can be written."""
    if "://" in where:
        return
    folder = Path(where)
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir():
        raise StorageError(f"{above} is a file; give a folder for the images.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{above} is not writable.")
