"""What a run is made of: the schema of configuration files, with its defaults.

Unknown keys, other types and numbers that are not finite are refused. The fields of strategies
(`sampler`, `guidance`) are checked by the registry. `sampler.config.layers` merges the places where
settings come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sampler import registry
from sampler.config import yaml as strict_yaml
from sampler.errors import SamplerError, UsageError

STRATEGIES = ("sampler", "guidance")
KeyPath = strict_yaml.Path

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Pixels = Annotated[int, Field(ge=8, le=16384)]


@dataclass(frozen=True)
class ModelConfig:
    """path: a diffusers folder or hub id, null is the bundled model; auto: as `sampler.load`.

    lora: adapters of `sampler finetune`, DIR or DIR:weight each. student: one of it, whose own
    sampler, guidance and steps are the defaults. drop_encoders: all texts of a run are encoded
    first, and the memory of the encoders is given back before denoising.
    """

    path: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    lora: tuple[str, ...] = ()
    student: str | None = None
    drop_encoders: bool = False
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class RunConfig:
    """n: images per prompt; seed: image i of every prompt has seed + i, null derives them.

    dedupe: equal images are made once.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    width: Pixels | None = None
    height: Pixels | None = None
    n: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    negative_prompt: str | None = None
    dedupe: bool = True
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class PromptsConfig:
    """file: txt, csv, tsv, jsonl or parquet, "-" is standard input; texts: the prompts themselves.

    format: of the file, where its name does not tell. wildcards: a folder of NAME.txt files.
    expand: what becomes of {a|b} and __NAME__ in prompts; on_bad_row: error or skip.
    """

    file: str | None = None
    texts: tuple[str, ...] | None = None
    format: Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None = None
    wildcards: str | None = None
    expand: Literal["none", "random", "all"] = "none"
    on_bad_row: Literal["error", "skip"] = "error"
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class OutputConfig:
    """dir: the run folder, or a URL; null makes a new one below runs/.

    format, layout: what there is: PNG, in one folder (in parts of 1,000 above 10,000 images).
    metadata: what an image says of itself; name_template: of {index} {key} {seed} {slug} {sampler}
    {guidance} {axis:NAME}; flagged: what becomes of images that a safety checker flags; fsync:
    false trusts the operating system with what was written last.
    """

    dir: str | None = None
    format: Literal["png"] = "png"
    layout: Literal["flat"] = "flat"
    metadata: Literal["full", "basic", "none"] = "full"
    name_template: str | None = None
    flagged: Literal["keep", "blur", "drop"] = "keep"
    fsync: bool = True
    writer_threads: Annotated[int, Field(ge=1, le=16)] = 2
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Limits:
    """What a run may ask for at most."""

    max_jobs: Annotated[int, Field(ge=1)] = 1_000_000
    max_pixels: Annotated[int, Field(ge=64)] = 16_777_216
    max_steps: Annotated[int, Field(ge=1)] = 1000
    max_prompt_chars: Annotated[int, Field(ge=1)] = 20_000
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class ErrorsConfig:
    """strict: the first image that fails ends the run; max_errors: more than so many do.

    on_oom: halve the batch, or let its images fail; on_nonfinite: decode again in float32, or not.
    """

    strict: bool = False
    max_errors: Annotated[int, Field(ge=0)] | None = None
    on_oom: Literal["shrink", "fail"] = "shrink"
    on_nonfinite: Literal["retry", "fail"] = "retry"
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Config:
    """A whole configuration; `sampler` and `guidance` are specs as `sampler.build` takes them."""

    version: Literal[1] = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: Any = None
    guidance: Any = None
    run: RunConfig = field(default_factory=RunConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    limits: Limits = field(default_factory=Limits)
    errors: ErrorsConfig = field(default_factory=ErrorsConfig)
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


def checked(tree: Mapping[str, Any], sources: Mapping[KeyPath, str]) -> Config:
    """The configuration of a tree of plain values, strategies included.

    sources: where each key path was said. Raises SamplerError (2): `where: key: problem`.
    """
    try:
        config = _adapter().validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _first(error, sources) from None
    for kind in STRATEGIES:
        try:
            strategy_of(config, kind)
        except ValueError as error:
            raise UsageError(f"{said_at((kind,), sources)}: {error}") from None
    return config


def strategy_of(config: Config, kind: str, default: Any = None) -> Any:
    """The strategy of a configuration, built; `default` (an instance) where it says nothing.

    Fields without a name belong to the default. Raises ValueError as `registry.build` does.
    """
    spec = getattr(config, kind)
    if spec is None:
        return default
    if isinstance(spec, Mapping) and "name" not in spec:
        base = {"name": {"sampler": "ddim", "guidance": "cfg"}[kind]}
        spec = {**(base if default is None else registry.spec_of(default)), **spec}
    return registry.build(kind, spec)


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_adapter().json_schema()}


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _first(error: ValidationError, sources: Mapping[KeyPath, str]) -> SamplerError:
    """The first of pydantic's problems as one sentence."""
    problem = error.errors()[0]
    path = tuple(problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        text = f": unknown key{registry.nearest(str(path[-1]), _keys(path[:-1]))}"
    else:
        path = _known(path)
        same = [p["msg"] for p in error.errors() if _known(tuple(p["loc"])) == path]
        shown = json.dumps(problem["input"], ensure_ascii=False)
        limits = " or ".join(message.removeprefix("Input should ") for message in same)
        text = f" = {shown:.60} must {limits}"
    return UsageError(f"{said_at(path, sources)}: {'.'.join(map(str, path))}{text}.")


def _known(path: KeyPath) -> KeyPath:
    """A path without what pydantic adds to it for the members of a union."""
    return path[: 3 if path[:2] == ("prompts", "texts") else 2]


def _keys(path: KeyPath) -> list[str]:
    """The keys of the section at a path."""
    section: Any = Config
    for part in path:
        section = get_type_hints(section).get(str(part))
    return [f.name for f in fields(section)] if is_dataclass(section) else []


def said_at(path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    """Where a key was said, or the nearest thing above or below it."""
    for length in range(len(path), 0, -1):
        if path[:length] in sources:
            return sources[path[:length]]
    below = [source for key, source in sources.items() if key[: len(path)] == path]
    return below[-1] if below else "configuration"
