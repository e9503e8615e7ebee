"""Settings of a prompt line: its own over those of the run, checked and complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sampler import registry
from sampler.config.schema import Limits
from sampler.core.inputs import planned
from sampler.core.spacings import count_of
from sampler.runs.jobs import JobSettings, canonical
from sampler.runs.lines import PromptLine
from sampler.samplers.aliases import named


@dataclass(frozen=True)
class RunDefaults:
    """Values for whatever a prompt line leaves out.

    seed: of the first image of every line, None derives seeds from run_seed and the job. scale:
    replaces that of `settings` and of rules that lines name, except where a line gives its own.
    """

    settings: JobSettings
    negative_prompt: str = ""
    seed: int | Literal["random"] | None = None
    n: int = 1
    run_seed: int = 0
    drawn: int | None = None
    scale: float | None = None
    limits: Limits = field(default_factory=Limits)


def line_settings(
    line: PromptLine, defaults: RunDefaults, native: tuple[int, int] | None
) -> JobSettings:
    """Merge a line with the defaults. Raises ValueError for what strategies and limits refuse.

    native: default (height, width) of the model.
    """
    base, limits = defaults.settings, defaults.limits
    given, said = named(line.sampler)
    sampler = _merge(given, base.sampler)
    guidance = _merge(line.guidance, base.guidance)
    scale = defaults.scale if line.scale is None else line.scale
    has_own = line.scale is None and _has_scale(line.guidance)
    if scale is not None and not has_own:
        guidance = with_scale(guidance, scale)
    if line.fields:  # a field may belong to a default rule inside
        sampler, guidance = complete_spec("sampler", sampler), complete_spec("guidance", guidance)
    for key, value in line.fields.items():
        kind, _, rest = key.partition(".")
        if kind == "sampler":
            sampler = _with_field(sampler, rest.split("."), value)
        else:
            guidance = _with_field(guidance, rest.split("."), value)
    grid = next((g for g in (line.grid, said, base.grid) if g is not None), None)
    settings = JobSettings(
        count_of(grid) or line.steps or base.steps,
        line.height or base.height or (native[0] if native else None),
        line.width or base.width or (native[1] if native else None),
        complete_spec("sampler", sampler),
        complete_spec("guidance", guidance),
        {name: planned(name, value) for name, value in {**base.inputs, **line.inputs}.items()},
        grid,
    )
    if settings.steps > limits.max_steps:
        raise ValueError(
            f"steps: {settings.steps} is more than {limits.max_steps} (limits.max_steps)."
        )
    for name in ("height", "width"):
        if (value := getattr(settings, name)) and value % 8:
            raise ValueError(f"{name} = {value} must be a multiple of 8.")
    pixels = (settings.height or 0) * (settings.width or 0)
    if pixels > limits.max_pixels or max(settings.height or 0, settings.width or 0) > 65_536:
        raise ValueError(
            f"width, height: more than {limits.max_pixels} pixels (limits.max_pixels)."
        )
    return settings


def complete_spec(kind: str, spec: Any) -> dict[str, Any]:
    """Spec of a strategy with every field, as plain data. Raises ValueError if it holds others."""
    full = registry.spec_of(registry.build(kind, spec))
    try:
        return json.loads(canonical(full))
    except (TypeError, ValueError):
        name = full.get("name", spec) if isinstance(full, Mapping) else spec
        raise ValueError(
            f"{kind}: {name!s:.60} holds what a run folder cannot record; only names, numbers and "
            "texts can be, so call generate without out."
        ) from None


def with_scale(spec: Any, scale: float) -> dict[str, Any]:
    """Spec of the rule, or of the rule inside it, with this guidance scale.

    Raises ValueError if none has a scale.
    """
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


def _has_scale(spec: Any) -> bool:
    """A spec that gives a scale, to the rule or to one inside it."""
    inner = spec.items() if isinstance(spec, Mapping) else ()
    return any(name == "scale" or _has_scale(value) for name, value in inner)


def _merge(given: Any, base: Mapping[str, Any]) -> Mapping[str, Any]:
    """Strategy of a line; fields without a name, or under the run's, change the run's strategy."""
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
