"""Rewards, and other code, given as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sampler import registry
from sampler.core.errors import UsageError, first_line
from sampler.rewards.base import RewardBase, as_reward


def reward_from(spec: Any, allow_python: bool = False) -> RewardBase:
    """Build a reward from a name, a mapping, an instance, a function, or "module:function".

    "module:function" imports a module of the working directory, or an installed one, and needs
    allow_python, also inside a composite reward. A function is differentiable where it has an
    attribute `differentiable = True`.

    Raises ValueError as `registry.build` does; SamplerError (2) for code that is not allowed, not
    found, or that fails when it is imported.
    """
    if is_python(spec):
        return as_reward(code_from("reward", spec, allow_python))
    if isinstance(spec, Mapping):
        spec = {key: _nested(value, allow_python) for key, value in spec.items()}
    return as_reward(registry.build("reward", spec))


def is_python(spec: Any) -> bool:
    """Return True for "module:function"."""
    return isinstance(spec, str) and ":" in spec


def has_python(spec: Any) -> bool:
    """Return True where a reward, or one inside it, is "module:function"."""
    if isinstance(spec, Mapping):
        return any(has_python(spec.get(key)) for key in ("reward", "rewards"))
    return any(map(has_python, spec)) if isinstance(spec, (list, tuple)) else is_python(spec)


def _nested(value: Any, allow_python: bool) -> Any:
    if not has_python(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_nested(one, allow_python) for one in value)
    return reward_from(value, allow_python)


def code_from(
    kind: str, spec: str, allow_python: bool, takes: str = "(images, prompts)"
) -> Callable[..., Any]:
    """Import "module:function" for a `kind` of setting; takes: its arguments, for the error.

    Raises UsageError for code that is not allowed, not found, or that fails when it is imported.
    """
    if not allow_python:
        raise UsageError(
            f"The {kind} {spec!r} is Python code: give --allow-python (allow_python=True) to run "
            "it.",
        )
    module, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        code = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, (ModuleNotFoundError, ValueError)) and _is_missing(module, error):
            raise UsageError(
                f"The {kind} {spec!r} was not found: {here} has no {module.partition('.')[0]}.py, "
                f"and no module {module!r} is installed."
            ) from error
        raise UsageError(
            f"The {kind} {spec!r} failed to import with {type(error).__name__}: {first_line(error)}"
        ) from error
    found = getattr(code, name, None)
    if found is None:
        near = registry.suggestion(name, [key for key in vars(code) if not key.startswith("_")])
        raise UsageError(f"The {kind} {spec!r} was not found: {module} has no {name!r}{near}.")
    try:
        found = found() if isinstance(found, type) else found
    except Exception as error:
        raise UsageError(
            f"The {kind} {spec!r} failed with {type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(found):
        raise UsageError(f"The {kind} {spec!r} must be a function {takes}.")
    return found


def _is_missing(module: str, error: Exception) -> bool:
    """Return True where the module itself is missing, not one that it imports."""
    missing = getattr(error, "name", None)
    return not module.strip(".") or missing is not None and f"{module}.".startswith(f"{missing}.")
