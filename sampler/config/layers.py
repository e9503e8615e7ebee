"""Layers of settings and their precedence.

Later layers win: the defaults, a preset, configuration files in the order given, the environment
(SAMPLER_OUT, SAMPLER_DEVICE), `--set a.b=value`, named options. Sections are merged key by key. A
strategy (`sampler`, `guidance`) is merged field by field while its name stays the same; another
name starts with that strategy's own defaults.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from sampler.config import formats
from sampler.config import yaml as strict_yaml
from sampler.config.options import Preset
from sampler.config.problems import KeyPath
from sampler.config.schema import STRATEGIES, Config, validated
from sampler.core.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
ENVIRONMENT = {"SAMPLER_OUT": "output.dir", "SAMPLER_DEVICE": "model.device"}


@dataclass(frozen=True)
class Layer:
    """A tree of settings, and the source of each key path ("cfg.yaml:3", "--steps")."""

    tree: Mapping[str, Any]
    sources: Mapping[KeyPath, str]


def read_file(path: Path) -> Layer:
    """Read a YAML, TOML or JSON file.

    `prompts.file`, `prompts.wildcards` and `trainer.data` are relative to its folder. Raises
    UsageError that names the file and the line.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(strict_yaml.MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or "it cannot be read").lower()
        raise UsageError(f"{path}: {reason}.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text.") from None
    tree, lines = formats.parse(text, str(path), path.suffix.lower())
    if not isinstance(tree, dict | None):
        raise UsageError(f"{path}:1: a configuration is a mapping (key: value).")
    tree = {**(tree or {})}
    prompts: Any = tree.get("prompts")
    if isinstance(prompts, list):
        tree["prompts"] = {"texts": prompts}
    elif isinstance(prompts, dict):
        tree["prompts"] = {
            key: str(path.parent / expanduser(value)) if _is_path(key, value) else value
            for key, value in prompts.items()
        }
    trainer: Any = tree.get("trainer")
    if isinstance(trainer, dict) and isinstance(data := trainer.get("data"), str):
        tree["trainer"] = {**trainer, "data": str(path.parent / expanduser(data))}
    return Layer(tree, {key: f"{path}:{line}" for key, line in lines.items()})


def preset_files(name: Preset | None) -> list[Path]:
    """Path of a shipped preset, if one is named."""
    return [] if name is None else [PRESETS / f"{name}.yaml"]


def _is_path(key: str, value: Any) -> bool:
    return key in ("file", "wildcards") and isinstance(value, str) and value != "-"


def from_environment(environment: Mapping[str, str]) -> list[Layer]:
    """One layer per variable of ENVIRONMENT that is set and not empty."""
    return [
        _layer(key, environment[name], name)
        for name, key in ENVIRONMENT.items()
        if environment.get(name)
    ]


def from_sets(assignments: Sequence[str]) -> list[Layer]:
    """One layer per `a.b=value`; the value is read as YAML. Raises UsageError."""
    layers = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UsageError(f"--set takes a.b=value, not {text!r:.60}.")
        parsed, _ = strict_yaml.parse(value, f"--set {key}")
        layers.append(_layer(key.strip(), parsed, "--set"))
    return layers


def from_options(options: Mapping[str, tuple[str, Any]]) -> list[Layer]:
    """One layer per named option {"--steps": ("run.steps", 20)} whose value is not None."""
    return [
        _layer(key, value, option) for option, (key, value) in options.items() if value is not None
    ]


def resolve(lower: Sequence[Layer], sets: Sequence[Layer], options: Sequence[Layer]) -> Config:
    """Merge layers into a validated configuration.

    lower: files, then the environment. A strategy's name from an option is applied before the
    fields from --set, so that `--sampler ab --set sampler.order=2` sets both.
    Raises UsageError: `where: key: problem (did you mean ...)`.
    """
    naming = [layer for layer in sets if _names_strategy(layer)]
    rest = [layer for layer in sets if not _names_strategy(layer)]
    named = [layer for layer in options if _names_strategy(layer)]
    tree: dict[str, Any] = {}
    sources: dict[KeyPath, str] = {}
    for layer in [*lower, *naming, *named, *rest, *options]:
        tree = merged(tree, layer.tree, [(kind,) for kind in STRATEGIES])
        sources.update(layer.sources)
    return validated(tree, sources)


def _layer(key: str, value: Any, source: str) -> Layer:
    path = tuple(part.strip() for part in key.split("."))
    tree: Any = value
    for part in reversed(path):
        tree = {part: tree}
    return Layer(tree, {path: source})


def _names_strategy(layer: Layer) -> bool:
    return any(
        kind in layer.tree and (not isinstance(spec, dict) or "name" in spec)
        for kind in STRATEGIES
        for spec in [layer.tree.get(kind)]
    )


def merged(base: Any, new: Any, strategies: Collection[KeyPath], path: KeyPath = ()) -> Any:
    """Merge `new` over `base`: mappings key by key, unless a strategy changes its name.

    strategies: key paths of strategies; path: key path of `base` and `new`.
    """
    strategic = any(path[: len(place)] == place for place in strategies)
    if path in strategies and isinstance(new, str) and ":" not in new:  # not "module:function"
        new = {"name": new}
    if strategic and isinstance(new, Mapping) and isinstance(base, str):
        base = {"name": base}
    if not isinstance(base, Mapping) or not isinstance(new, Mapping):
        return new
    if strategic and "name" in new and new["name"] != base.get("name", new["name"]):
        return new
    below = {k: merged(base.get(k), v, strategies, (*path, k)) for k, v in new.items()}
    return {**base, **below}
