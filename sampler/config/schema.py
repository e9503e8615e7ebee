"""Schema of configuration files, with defaults.

Unknown keys, wrong types and non-finite numbers are refused. The fields of strategies (`sampler`,
`guidance`) are checked by the registry. `sampler.config.layers` merges the sources of settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from os.path import expanduser
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from sampler import registry
from sampler.config.model import ModelConfig
from sampler.config.options import (
    Expand,
    ExtraColumns,
    ImageFormat,
    Metadata,
    OnBadRow,
    TableFormat,
    VideoFormat,
)
from sampler.config.problems import KeyPath, first_problem, source_of
from sampler.core.errors import UsageError
from sampler.samplers.aliases import named

STRATEGIES = ("sampler", "guidance")

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
FilePath = Annotated[str, AfterValidator(expanduser)]
Pixels = Annotated[int, Ge(8), Le(16384)]


@dataclass(frozen=True)
class RunConfig:
    """Run section.

    n: images per prompt. seed: image i of every prompt has seed + i; null derives the seeds, random
    draws one. dedupe: generate identical jobs once.
    """

    steps: Annotated[int, Ge(1), Le(1000)] = 20
    width: Pixels | None = None
    height: Pixels | None = None
    n: Annotated[int, Ge(1), Le(1_000_000)] = 1
    seed: Annotated[int, Ge(0), Lt(2**63)] | Literal["random"] | None = None
    batch_size: Literal["auto"] | Annotated[int, Ge(1)] = "auto"
    negative_prompt: str | None = None
    dedupe: bool = True
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class PromptsConfig:
    """Prompts section.

    file: prompt file; "-" is standard input. texts: prompts in the configuration itself. format:
    of the file; null goes by its name. wildcards: folder of NAME.txt files. expand: how {a|b} and
    __NAME__ in prompts are expanded. on_bad_row: what to do with an invalid line. extra_columns:
    keep records unknown columns as meta_NAME.
    """

    file: FilePath | None = None
    texts: tuple[str, ...] | None = None
    format: TableFormat | None = None
    wildcards: FilePath | None = None
    expand: Expand = "none"
    on_bad_row: OnBadRow = "error"
    extra_columns: ExtraColumns = "error"
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class OutputConfig:
    """Output section.

    dir: run folder or URL; null creates one below runs/. quality: of jpeg and webp; null is 95.
    video, fps: format and frames per second of videos; mp4 needs the extra `video`.
    metadata: embedded in every image.
    name_template: file names from {index} {key} {seed} {slug} {sampler} {guidance} {axis:NAME}.
    flagged: policy for images that a safety checker flags. fsync: false skips flushing to disk, so
    that a power failure can lose the latest images.
    """

    dir: FilePath | None = None
    format: ImageFormat = "png"
    quality: Annotated[int, Ge(1), Le(100)] | None = None
    video: VideoFormat = "webp"
    fps: Annotated[int, Ge(1), Le(240)] = 16
    metadata: Metadata = "full"
    name_template: str | None = None
    flagged: Literal["keep", "blur", "drop"] = "keep"
    fsync: bool = True
    writer_threads: Annotated[int, Ge(1), Le(16)] = 2
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Limits:
    """Upper limits of a run."""

    max_jobs: Annotated[int, Ge(1)] = 1_000_000
    max_pixels: Annotated[int, Ge(64)] = 16_777_216
    max_steps: Annotated[int, Ge(1)] = 1000
    max_prompt_chars: Annotated[int, Ge(1)] = 20_000
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class ErrorsConfig:
    """Errors section.

    strict: stop at the first failed image. max_errors: abort after more failures than this.
    on_oom: shrink halves the batch, fail lets its images fail. on_nonfinite: retry decodes once
    more in float32.
    """

    strict: bool = False
    max_errors: Annotated[int, Ge(0)] | None = None
    on_oom: Literal["shrink", "fail"] = "shrink"
    on_nonfinite: Literal["retry", "fail"] = "retry"
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Config:
    """Complete configuration; `sampler` and `guidance` are specs for `sampler.build`.

    inputs: further arguments of the stock pipeline's call by name; files are images.
    """

    version: Literal[1] = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: Any = None
    guidance: Any = None
    inputs: dict[str, Any] = field(default_factory=dict[str, Any])
    run: RunConfig = field(default_factory=RunConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    limits: Limits = field(default_factory=Limits)
    errors: ErrorsConfig = field(default_factory=ErrorsConfig)
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


def validated(tree: Mapping[str, Any], sources: Mapping[KeyPath, str]) -> Config:
    """Validate a tree of plain values, strategies included.

    sources: where each key path was set. Raises UsageError: `where: key: problem`.
    """
    try:
        tree = _with_our_names(tree)
    except ValueError as error:
        raise UsageError(f"{source_of(('sampler',), sources)}: {error}") from None
    try:
        config = _adapter().validate_json(json.dumps(tree))
    except ValidationError as error:
        raise first_problem(error, sources, Config) from None
    for kind in STRATEGIES:
        try:
            _check_strategy(getattr(config, kind), kind)
        except ValueError as error:
            raise UsageError(f"{source_of((kind,), sources)}: {error}") from None
    return config


def _with_our_names(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with the sampler's name in this project, and the grid that an alias includes."""
    spec, grid = named(tree.get("sampler"))
    if spec is tree.get("sampler"):
        return tree
    model = tree.get("model") or {}
    if grid is not None and isinstance(model, Mapping) and model.get("grid") is None:
        tree = {**tree, "model": {**model, "grid": grid}}
    return {**tree, "sampler": spec}


def _check_strategy(spec: Any, kind: str) -> None:
    """Raise ValueError as `registry.build` does; fields without a name are those of ddim or cfg."""
    if isinstance(spec, Mapping) and "name" not in spec:
        spec = {"name": {"sampler": "ddim", "guidance": "cfg"}[kind], **spec}
    if spec is not None:
        registry.build(kind, spec)


def schema() -> dict[str, Any]:
    """JSON schema of configuration files."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_adapter().json_schema()}


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)
