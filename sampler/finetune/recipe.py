"""Configuration files of `sampler finetune`: what is trained, on what, for what, and how.

    version: 1
    model: {path: null}                      # null is the bundled model
    trainer: {name: alignprop, truncation: fixed, k: 1}
    reward: soft_compressibility
    prompts: {file: prompts.txt}             # or a list of texts
    output: {dir: runs/tune}
    fit: {updates: 20, batch: 8, steps: 20}  # sampler/finetune/settings.py

Later layers win, as for `generate`; a strategy is merged field by field while its name stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sampler import registry
from sampler.config import KeyPath, ModelConfig
from sampler.finetune.settings import settings_from
from sampler.layers import Layer
from sampler.types import SamplerError

STRATEGIES = (("trainer",), ("reward",), ("fit", "sampler"), ("fit", "guidance"))
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Prompts:
    """file: a .txt file, one prompt per line; texts: the prompts themselves."""

    file: str | None = None
    texts: tuple[str, ...] | None = None
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Output:
    """dir: the run folder."""

    dir: str = "runs/tune"
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Recipe:
    """A whole configuration; trainer and reward are specs, fit a mapping of settings."""

    version: Literal[1] = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: Any = "alignprop"
    reward: Any = None
    prompts: Prompts = field(default_factory=Prompts)
    output: Output = field(default_factory=Output)
    fit: Any = field(default_factory=dict[str, Any])
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


def resolve(layers: Sequence[Layer]) -> Recipe:
    """The recipe of merged layers, later ones winning; strategies and settings are checked.

    Raises SamplerError (2): `where: problem`.
    """
    tree: dict[str, Any] = {}
    sources: dict[KeyPath, str] = {}
    for layer in layers:
        tree = merged(tree, layer.tree, ())
        sources.update(layer.sources)
    known = [f.name for f in fields(Recipe)]
    for key in tree:
        if key not in known:
            near = registry.nearest(key, known)
            raise SamplerError(f"{_where((key,), sources)}: unknown key {key!r}{near}.", 2)
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tree))
    except ValidationError as error:
        problem = error.errors()[0]
        path = tuple(problem["loc"])[:2]
        shown = json.dumps(problem["input"], ensure_ascii=False)
        name = ".".join(map(str, path))
        text = f"{name} = {shown:.60}: {problem['msg'].lower()}"
        raise SamplerError(f"{_where(path, sources)}: {text}.", 2) from None
    trainer = _checked("trainer", recipe.trainer, _where(("trainer",), sources))
    if recipe.reward is None and trainer.rewarded:
        known = ", ".join(registry.names("reward"))
        raise SamplerError(f"No reward: give --reward, one of {known}.", 2)
    reward = recipe.reward
    if reward is not None and not (isinstance(reward, str) and ":" in reward):
        _checked("reward", reward, _where(("reward",), sources))
    if not isinstance(recipe.fit, dict):
        raise SamplerError(f"{_where(('fit',), sources)}: fit is a mapping (key: value).", 2)
    try:
        settings_from(recipe.fit)
    except SamplerError as error:
        raise SamplerError(f"{_where(('fit',), sources)}: {error}", 2) from None
    return recipe


def merged(base: Any, new: Any, path: tuple[str, ...]) -> Any:
    """`new` over `base`; mappings key by key, except where a strategy changes its name."""
    if path in STRATEGIES:
        new = {"name": new} if isinstance(new, str) and ":" not in new else new
        base = {"name": base} if isinstance(base, str) else base
        other = isinstance(new, Mapping) and "name" in new and isinstance(base, Mapping)
        if other and new["name"] != base.get("name", new["name"]):
            return new
    if not isinstance(base, Mapping) or not isinstance(new, Mapping):
        return new
    return {**base, **{k: merged(base.get(k), v, (*path, k)) for k, v in new.items()}}


def _checked(kind: str, spec: Any, where: str) -> Any:
    try:
        return registry.build(kind, spec)
    except ValueError as error:
        raise SamplerError(f"{where}: {error}", 2) from None


def _where(path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    """Where a key was said, or the nearest thing above or below it."""
    for length in range(len(path), 0, -1):
        if path[:length] in sources:
            return sources[path[:length]]
    below = [source for key, source in sources.items() if key[: len(path)] == path]
    return below[-1] if below else "configuration"
