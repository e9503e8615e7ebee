"""Configuration files of `sampler finetune`.

    version: 1
    model: {path: null}                      # null is the bundled model
    trainer: {name: alignprop, truncation: fixed, k: 1}
    reward: soft_compressibility
    prompts: {file: prompts.txt}             # or a list of texts
    output: {dir: runs/tune}
    fit: {updates: 20, batch: 8, steps: 20}  # sampler/training/settings.py

Later layers win, as for `generate`; a strategy is merged field by field while its name stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sampler import registry
from sampler.config.layers import Layer, merged
from sampler.config.model import ModelConfig
from sampler.config.problems import KeyPath, first_problem, source_of
from sampler.config.schema import FilePath
from sampler.core.errors import SamplerError, UsageError
from sampler.rewards.python import has_python
from sampler.training.settings import settings_from

STRATEGIES = (("trainer",), ("reward",), ("fit", "sampler"), ("fit", "guidance"))
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class PromptsSection:
    """file: a prompt file; texts: the prompts themselves, or mappings like its rows."""

    file: FilePath | None = None
    texts: tuple[str | dict[str, Any], ...] | None = None
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class OutputSection:
    """dir: the run folder."""

    dir: FilePath = "runs/tune"
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Recipe:
    """A configuration; trainer and reward are specs, fit a mapping of settings."""

    version: Literal[1] = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: Any = "alignprop"
    reward: Any = None
    prompts: PromptsSection = field(default_factory=PromptsSection)
    output: OutputSection = field(default_factory=OutputSection)
    fit: Any = field(default_factory=dict[str, Any])
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


def resolve_recipe(layers: Sequence[Layer]) -> Recipe:
    """Merge layers into a recipe, later ones winning, and check strategies and settings.

    Raises SamplerError (2): `where: problem`.
    """
    tree: dict[str, Any] = {}
    sources: dict[KeyPath, str] = {}
    for layer in layers:
        tree = merged(tree, layer.tree, STRATEGIES)
        sources.update(layer.sources)
    if isinstance(tree.get("trainer"), Mapping) and "name" not in tree["trainer"]:
        tree["trainer"] = {"name": Recipe.trainer, **tree["trainer"]}
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise first_problem(error, sources, Recipe) from None
    if recipe.model.drop_encoders:
        where = source_of(("model", "drop_encoders"), sources)
        raise UsageError(
            f"{where}: model.drop_encoders: fine-tuning needs the text encoders; leave it out."
        )
    trainer = _checked("trainer", recipe.trainer, source_of(("trainer",), sources))
    if recipe.reward is None and trainer.needs_reward:
        known = ", ".join(registry.names("reward"))
        raise UsageError(f"No reward: give --reward, one of {known}.")
    reward = recipe.reward
    if reward is not None and not has_python(reward):
        _checked("reward", reward, source_of(("reward",), sources))
    if not isinstance(recipe.fit, dict):
        raise UsageError(f"{source_of(('fit',), sources)}: fit is a mapping (key: value).")
    try:
        settings_from(recipe.fit)
    except SamplerError as error:
        raise UsageError(f"{source_of(('fit',), sources)}: {error}") from None
    return recipe


def _checked(kind: str, spec: Any, where: str) -> Any:
    try:
        return registry.build(kind, spec)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
