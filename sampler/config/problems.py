"""Problems that pydantic finds in a configuration, as sentences with their source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pydantic import ValidationError

from sampler import registry
from sampler.config import yaml as strict_yaml
from sampler.core.errors import SamplerError, UsageError
from sampler.registry.ranges import allowed, hints, without_none

KeyPath = strict_yaml.Path


def first_problem(
    error: ValidationError, sources: Mapping[KeyPath, str], root: type
) -> SamplerError:
    """The first of pydantic's problems with a configuration, as one sentence.

    root: dataclass of the configuration; sources: where each key path was set.
    """
    problem = error.errors()[0]
    path = tuple(problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        text = f": unknown key{registry.suggestion(str(path[-1]), _keys(path[:-1], root))}"
    else:
        path = _known(path)
        shown = json.dumps(problem["input"], ensure_ascii=False)
        text = f" = {shown:.60} must be {allowed(_hint(path, root))}"
    return UsageError(f"{source_of(path, sources)}: {'.'.join(map(str, path))}{text}.")


def _known(path: KeyPath) -> KeyPath:
    """A path without the parts that pydantic appends for the members of a union."""
    return path[: 3 if path[:2] == ("prompts", "texts") else 2]


def _hint(path: KeyPath, root: type) -> Any:
    """Type of the value at a path, without None."""
    hint: Any = root
    for part in path:
        is_section = is_dataclass(hint)
        hint = hints(hint)[str(part)] if is_section else get_args(hint)[0]
        hint = without_none(hint)
    return hint


def _keys(path: KeyPath, root: type) -> list[str]:
    """Keys of the section at a path."""
    section = _hint(path, root)
    return [f.name for f in fields(section)] if is_dataclass(section) else []


def source_of(path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    """Source of a key path, or of the nearest path above or below it."""
    for length in range(len(path), 0, -1):
        if path[:length] in sources:
            return sources[path[:length]]
    below = [source for key, source in sources.items() if key[: len(path)] == path]
    return below[-1] if below else "configuration"
