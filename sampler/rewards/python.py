"""Rewards given as `module:function`."""

from __future__ import annotations

import importlib
from typing import Any

from sampler import registry
from sampler.core.errors import UsageError
from sampler.rewards.base import RewardBase, as_reward


def reward_from(spec: Any, allow_python: bool = False) -> RewardBase:
    """Build a reward from a name, a mapping, an instance, a function, or "module:function".

    "module:function" imports and runs code of the caller's choice and needs allow_python. A
    function is differentiable where it has an attribute `differentiable = True`.

    Raises ValueError as `registry.build` does; SamplerError (2) for code that is not allowed or
    not found.
    """
    if not isinstance(spec, str) or ":" not in spec:
        return as_reward(registry.build("reward", spec))
    if not allow_python:
        raise UsageError(
            f"The reward {spec!r} is Python code: give --allow-python (allow_python=True) to run "
            "it.",
        )
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"The reward {spec!r} was not found: {error}.") from error
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise UsageError(f"The reward {spec!r} must be a function (images, prompts).")
    return as_reward(found)
