"""Inputs of a plan: a configuration, prompts, and the axes of a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from sampler.bundled import BUNDLED_PARTS
from sampler.config.schema import STRATEGIES, Config, OutputConfig
from sampler.core.errors import UsageError
from sampler.core.inputs import input_size
from sampler.models.controlnet import class_with, controlnet_paths
from sampler.models.folder import default_strategies
from sampler.models.source import find_source
from sampler.runs import fingerprint, tables
from sampler.runs.axes import Axis, sweep
from sampler.runs.encodings import QUALITY
from sampler.runs.folder import OutputOptions
from sampler.runs.jobs import JobSettings, Model
from sampler.runs.media import check_video
from sampler.runs.names import check_template
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.settings import RunDefaults, complete_spec, with_scale
from sampler.runs.start import PlannedRun, plan_run
from sampler.runs.wildcards import Wildcards

DRAWN = "random_seed"  # key of run.json


@dataclass(frozen=True)
class Source:
    """Configuration, prompts of the command line, and axes.

    fast: fingerprint the model from a sample of each file. defaults: sampler and guidance of a
    model whose defaults are known only after a load. scale: guidance scale over the
    configuration's; None leaves it. drawn: random number of the run to resume. lines: instead of
    the prompts of the command line and the configuration. skipped: errors of lines that were left
    out; notes: remarks on the others. Both are filled by `plan`.
    """

    config: Config
    prompts: Sequence[str] = ()
    axes: Sequence[Axis] = ()
    fast: bool = False
    defaults: Mapping[str, Any] | None = None
    scale: float | None = None
    drawn: int | None = None
    lines: Sequence[RawLine] | None = None
    marks: Mapping[str, Any] = field(default_factory=dict[str, Any])
    skipped: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def model(self) -> Model:
        """Fingerprint the model from its files. Errors as `fingerprint.model_of`."""
        return fingerprint.model_of(self.config.model, self.fast)

    def unused(self) -> list[str]:
        """Files of the model's folder that a load does not read."""
        model = self.config.model
        if model.path in (None, *BUNDLED_PARTS):
            return []
        files = {name: getattr(model, name) for name in ("config", "revision", "variant", "vae")}
        return find_source(model.path, **files).unused()

    def plan(self, model: Model) -> PlannedRun:
        """Read all prompts once and plan them. Raises UsageError."""
        output = self.config.output
        if output.name_template is not None:
            check_template(output.name_template)
        sections: dict[str, Any] = {
            name: asdict(getattr(self.config, name)) for name in ("model", "output", "errors")
        }
        sections["axes"] = [asdict(axis) for axis in self.axes]
        sections |= self.marks
        options = _output_options(output)
        planner = self._planner(model)
        planned = plan_run(planner, self.read_lines(), options, sections)
        if planner.drawn is not None:
            sections[DRAWN] = planner.drawn
        self.notes.extend(_notes(planner, self.config.run.seed == "random"))
        return planned

    def names_strategies(self) -> bool:
        """Sampler and guidance are both given by name, so that no default is needed."""
        given = [getattr(self.config, kind) for kind in STRATEGIES]
        return all(isinstance(spec, str) or (spec and "name" in spec) for spec in given)

    def read_lines(self) -> Iterator[RawLine]:
        """Yield prompts of the command line, then those of the file or the configuration."""
        if self.lines is not None:
            yield from self.lines
            return
        prompts = self.config.prompts
        texts = self.prompts or (() if prompts.file else prompts.texts or ())
        lines: Iterator[RawLine] = (
            RawLine(f"prompt {k}", {"prompt": text}) for k, text in enumerate(texts, 1)
        )
        if prompts.file is not None:
            lines = itertools.chain(lines, tables.read_table(prompts.file, prompts.format))
        yield from sweep(lines, list(self.axes)) if self.axes else lines

    def _planner(self, model: Model) -> Planner:
        config, run = self.config, self.config.run
        try:
            strategies = {kind: complete_spec(kind, self._spec(kind)) for kind in STRATEGIES}
            if self.scale is not None:
                rule = with_scale(strategies["guidance"], self.scale)
                strategies["guidance"] = complete_spec("guidance", rule)
        except ValueError as error:
            raise UsageError(str(error)) from None
        defaults = RunDefaults(
            JobSettings(
                run.steps,
                run.height,
                run.width,
                **strategies,
                inputs=config.inputs,
                grid=config.model.grid,
            ),
            run.negative_prompt or "",
            run.seed if run.seed is not None or not self.axes else 0,
            run.n,
            scale=self.scale,
            limits=config.limits,
            drawn=self.drawn,
        )
        prompts = config.prompts
        skip = prompts.on_bad_row == "skip"
        return Planner(
            model,
            defaults,
            run.batch_size,
            dedupe=run.dedupe,
            expand=prompts.expand,
            wildcards=Wildcards(Path(prompts.wildcards) if prompts.wildcards else None),
            keep_extra=prompts.extra_columns == "keep",
            default_size=partial(self._default_size, model, cache(self._call_class)),
            on_skip=(lambda error: self.skipped.append(str(error))) if skip else None,
        )

    def _call_class(self) -> type | None:
        """Class of the pipeline, with its ControlNets; None for one unknown to diffusers."""
        from sampler.pipelines.call_arguments import class_named

        cls = class_named(fingerprint.pipeline_of(self.config.model))
        folders = controlnet_paths(self.config.model.controlnet)
        return class_with(cls, folders) if cls is not None and folders else cls

    def _default_size(
        self, model: Model, call_class: Callable[[], type | None], inputs: Mapping[str, Any]
    ) -> tuple[int, int] | None:
        """Return (height, width) of a call with these inputs, without loading the model.

        That of the image to inpaint or of the control image, as multiples of 8, or the model's;
        None where the call takes no size. Raises ValueError for inputs that no class for the model
        takes, and for those that it needs.
        """
        section = self.config.model
        if not (inputs or section.controlnet or section.ip_adapter):
            return model.native
        from sampler.pipelines.call_arguments import arguments
        from sampler.pipelines.serving import check_ip_inputs, serving_class, sized_by

        check_ip_inputs(inputs, bool(section.ip_adapter))
        cls = call_class()
        if cls is None:
            return model.native
        if "height" not in arguments(serving_class(cls, inputs)):
            return None
        return input_size(inputs.get(sized_by(cls, inputs) or "")) or model.native

    def _spec(self, kind: str) -> Any:
        """Strategy of the run: as given, or the model's default with the given fields."""
        given = getattr(self.config, kind)
        if isinstance(given, str) or (given and "name" in given):
            return given
        model = self.config.model
        known = self.defaults or default_strategies(model.path, model.revision, model.config)
        if known is None:
            raise UsageError(
                f"The default {kind} of {model.path} is known only when the model is loaded; "
                f"name one with --{kind}.",
            )
        return {**known[kind], **(given or {})}


def _notes(planner: Planner, run_is_random: bool) -> Iterator[str]:
    if run_is_random:
        yield f"the seed {planner.drawn} was drawn at random (--seed {planner.drawn} repeats it)"
    for rule in sorted(planner.unheard):
        yield (
            f"guidance {rule!r} with these settings evaluates no unconditional branch: the "
            "negative prompt has no effect"
        )
    if planner.extra:
        columns = ", ".join(f"{name!r:.40}" for name in sorted(planner.extra)[:10])
        yield f"unknown columns are recorded as meta_NAME and change nothing: {columns}"
    if count := planner.unexpanded:
        lines = "1 prompt holds" if count == 1 else f"{count} prompts hold"
        yield (
            f"{lines} {{a|b}} or __name__, which stay text; --expand random or all reads them as "
            "templates"
        )


def _output_options(output: OutputConfig) -> OutputOptions:
    """Output options of a run. Raises UsageError for those that no file can be written with."""
    check_video(output.video)
    if output.quality is not None and output.format == "png":
        raise UsageError("output.quality belongs to output.format jpeg or webp; PNG is lossless.")
    return OutputOptions(
        output.metadata,
        output.name_template,
        output.flagged,
        output.format,
        output.quality or QUALITY,
        output.video,
        output.fps,
    )
