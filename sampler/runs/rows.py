"""What one row of a prompt file may say, checked, and the settings that it ends up with.

A row may set: prompt, negative_prompt, seed, n, width, height, steps, scale, sampler, guidance,
their fields (`sampler.order`, `guidance.rule.scale`), tag, and `meta_*`, which is copied along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sampler import registry
from sampler.config import Limits
from sampler.runs.jobs import MAX_SEED, Settings, canonical
from sampler.types import SamplerError

# Control characters (tab apart) and halves of surrogate pairs: nothing that text should hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")
_STRATEGIES = ("sampler", "guidance")


class Row(BaseModel):
    """One row; None is "as the run says". Strategies are names or {"name": ..., field: ...}."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    n: int | None = Field(None, ge=1, le=1_000_000)
    width: int | None = Field(None, ge=8)
    height: int | None = Field(None, ge=8)
    steps: int | None = Field(None, ge=1)
    scale: float | None = Field(None, ge=0)
    sampler: str | dict[str, Any] | None = None
    guidance: str | dict[str, Any] | None = None
    tag: str | None = Field(None, max_length=1000)
    meta: dict[str, Any] = Field(default_factory=dict)
    fields: dict[str, Any] = Field(default_factory=dict)


COLUMNS = tuple(name for name in Row.model_fields if name not in ("meta", "fields"))


def parse_row(cells: Mapping[str, Any], where: str, limits: Limits, text: bool) -> Row:
    """The row of some cells; `text`: all of them are text, and an empty one says nothing.

    Raises SamplerError (2): `where: key: problem (did you mean ...)`.
    """
    plain: dict[str, Any] = {}
    for key, value in cells.items():
        if text and value == "" and key != "prompt":
            continue
        if key in COLUMNS:
            plain[key] = value
        elif key.startswith("meta_"):
            plain.setdefault("meta", {})[key] = _checked(value, key, where)
        elif key.partition(".")[0] in _STRATEGIES and "." in key:
            plain.setdefault("fields", {})[key] = scalar(value) if text else value
        else:
            hint = registry.nearest(str(key)[:60], COLUMNS)
            raise SamplerError(f"{where}: {str(key)!r:.60}: unknown column{hint}.", 2)
    try:
        row = Row.model_validate(plain, strict=not text)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise SamplerError(f"{where}: {key:.60}: {message}.", 2) from None
    for key in ("prompt", "negative_prompt", "tag"):
        _check_text(getattr(row, key), key, where, limits)
    return row


def check_prompt(text: str, where: str, limits: Limits) -> None:
    """Raises SamplerError (2) for control characters, surrogates, and too long texts."""
    _check_text(text, "prompt", where, limits)


def scalar(text: Any) -> Any:
    """A cell as number, true, false, null, list or text, whichever it looks like."""
    if not isinstance(text, str) or len(text) > 1000:
        return text
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, dict) else value


@dataclass(frozen=True)
class Defaults:
    """What rows say nothing about. scale: for rules that a row names without one."""

    settings: Settings
    negative_prompt: str = ""
    seed: int | None = None
    n: int = 1
    run_seed: int = 0
    limits: Limits = field(default_factory=Limits)


def resolve(row: Row, defaults: Defaults, native: tuple[int, int] | None) -> Settings:
    """The settings of a row. Raises ValueError for what the strategies and limits refuse."""
    base, limits = defaults.settings, defaults.limits
    sampler = _spec("sampler", row.sampler, base.sampler)
    guidance = _spec("guidance", row.guidance, base.guidance)
    if row.scale is not None:
        guidance = with_scale(guidance, row.scale)
    if row.fields:  # a field may belong to a rule inside that is there by default
        sampler, guidance = resolved("sampler", sampler), resolved("guidance", guidance)
    for key, value in row.fields.items():
        kind, _, rest = key.partition(".")
        if kind == "sampler":
            sampler = _with_field(sampler, rest.split("."), value)
        else:
            guidance = _with_field(guidance, rest.split("."), value)
    settings = Settings(
        row.steps or base.steps,
        row.height or base.height or (native[0] if native else None),
        row.width or base.width or (native[1] if native else None),
        resolved("sampler", sampler),
        resolved("guidance", guidance),
    )
    if settings.steps > limits.max_steps:
        raise ValueError(f"steps: {settings.steps} is more than {limits.max_steps}.")
    for name in ("height", "width"):
        if (value := getattr(settings, name)) and value % 8:
            raise ValueError(f"{name} = {value} must be a multiple of 8.")
    pixels = (settings.height or 0) * (settings.width or 0)
    if pixels > limits.max_pixels or max(settings.height or 0, settings.width or 0) > 65_536:
        raise ValueError(f"width, height: more than {limits.max_pixels} pixels.")
    return settings


def resolved(kind: str, spec: Any) -> dict[str, Any]:
    """A strategy's spec with every field, as plain data. Raises ValueError where it is not."""
    full = registry.spec_of(registry.build(kind, spec))
    try:
        return json.loads(canonical(full))
    except (TypeError, ValueError):
        raise ValueError(
            f"{kind}: {getattr(full, 'get', lambda _: spec)('name')!s:.60} holds what a run folder "
            "cannot record; only names, numbers and texts can be, so call generate without out."
        ) from None


def with_scale(spec: Any, scale: float) -> dict[str, Any]:
    """The rule, or the rule inside it, with this guidance scale. ValueError where none has one."""
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    names = registry.lookup("guidance", spec["name"]).__dataclass_fields__  # pyright: ignore
    if "scale" in names:
        return {**spec, "scale": scale}
    for name, entry in names.items():
        if entry.metadata.get("kind") == "guidance":
            inner = spec.get(name, entry.default)
            if isinstance(inner, (str, Mapping)):
                return {**spec, name: with_scale(inner, scale)}
    raise ValueError(f"scale: the guidance {spec['name']!r} has no scale.")


def _spec(kind: str, given: Any, base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The run's strategy unless the row names one; fields given without a name change the run's."""
    if given is None:
        return base
    if isinstance(given, Mapping):
        return {**base, **given} if given.get("name", base["name"]) == base["name"] else given
    return base if given == base["name"] else {"name": given}


def _with_field(spec: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**spec, path[0]: value}
    inner = spec.get(path[0])
    if isinstance(inner, str):
        inner = {"name": inner}
    if not isinstance(inner, Mapping):
        raise ValueError(f"{'.'.join(path)}: the strategy has no rule {path[0]!r:.60} to change.")
    return {**spec, path[0]: _with_field(inner, path[1:], value)}


def _check_text(text: str | None, key: str, where: str, limits: Limits) -> None:
    if text is None:
        return
    if len(text) > limits.max_prompt_chars:
        limit = limits.max_prompt_chars
        raise SamplerError(f"{where}: {key}: the text has more than {limit} characters.", 2)
    if bad := _FORBIDDEN.search(text):
        code = ord(bad[0])
        raise SamplerError(f"{where}: {key}: holds the control character U+{code:04X}.", 2)


def _checked(value: Any, key: str, where: str) -> Any:
    """A meta value: any short plain data."""
    try:
        size = len(canonical(value))
    except (TypeError, ValueError, RecursionError):
        size = 0
    if not 0 < size <= 10_000 or any(_FORBIDDEN.search(text) for text in _texts(value)):
        raise SamplerError(
            f"{where}: {key:.60}: must be plain data of at most 10,000 characters, without "
            "control characters.",
            2,
        )
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
