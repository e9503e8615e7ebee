"""One line of a prompt file, checked.

A line may set: prompt, negative_prompt, seed, n, width, height, steps, scale, grid, sampler,
guidance, the fields of the last two (`sampler.order`, `guidance.rule.scale`), arguments of a stock
pipeline's call (`input.strength`), tag, and `meta_*`, which is copied along.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import DocInfo, Ge, Le, MaxLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sampler import registry
from sampler.config.schema import Limits
from sampler.core.errors import SamplerError, UsageError
from sampler.registry.ranges import allowed, hints, without_none
from sampler.runs.cells import RANDOM_SEED, STRATEGIES, given, scalar
from sampler.runs.jobs import canonical
from sampler.runs.readers import RawLine
from sampler.runs.tables import read_table
from sampler.types import MAX_SEED

# Control characters other than tab and line feed, and unpaired surrogates.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class PromptLine(BaseModel):
    """Fields of a line; None is the run's value. Strategies: names or {"name": ..., field: ...}."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: str
    negative_prompt: str | None = None
    seed: Annotated[int, Ge(RANDOM_SEED), Le(MAX_SEED), DocInfo("-1 draws one")] | None = None
    n: Annotated[int, Ge(1), Le(1_000_000)] | None = None
    width: Annotated[int, Ge(8)] | None = None
    height: Annotated[int, Ge(8)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    scale: Annotated[float, Ge(0)] | None = None
    sampler: str | dict[str, Any] | None = None
    guidance: str | dict[str, Any] | None = None
    grid: str | dict[str, Any] | list[float] | None = None
    tag: Annotated[str, MaxLen(1000)] | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    fields: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, Any] = Field(default_factory=dict)


META = "meta_"
_MAPPINGS = ("meta", "fields", "inputs")
COLUMNS = tuple(name for name in PromptLine.model_fields if name not in _MAPPINGS)
INPUT = "input."  # start of the columns that hold arguments of a stock pipeline's call


def parse_line(raw: RawLine, limits: Limits, extra: set[str] | None = None) -> PromptLine:
    """Check a line; empty text cells and nulls count as not given.

    extra: receives the names of unknown columns, which become `meta_NAME`; None refuses them.
    Raises UsageError: `where: key: problem (did you mean ...)`.
    """
    where, cells, text = raw[:3]
    if isinstance(cells, SamplerError):
        raise cells
    plain: dict[str, Any] = {}
    for key, value in cells.items():
        if value is None or (text and not str(value).strip()):
            if key == "prompt" and raw.empty_prompt:
                plain[key] = ""
            continue
        if isinstance(value, str):
            value = value.replace("\r\n", "\n")
        if key in COLUMNS:
            plain[key] = given(value, key, where)
        elif key.startswith(INPUT) and key != INPUT:
            own = plain.setdefault("inputs", {})
            own[key.removeprefix(INPUT)] = scalar(value) if text else value
        elif key.partition(".")[0] in STRATEGIES and "." in key:
            plain.setdefault("fields", {})[key] = scalar(value) if text else given(value, key)
        else:
            name = _meta_name(str(key), where, extra)
            if name in plain.setdefault("meta", {}):
                raise UsageError(f"{where}: {name:.60}: is given twice.")
            plain["meta"][name] = _checked(value, name, where)
    if "prompt" not in plain and cells:
        raise UsageError(f"{where}: prompt: the line has settings but no prompt.")
    try:
        line = PromptLine.model_validate(plain, strict=not text)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        if problem["type"] == "missing":
            raise UsageError(f"{where}: {key} is missing.") from None
        what = allowed(without_none(hints(PromptLine)[key]))
        raise UsageError(f"{where}: {key} = {problem['input']!r:.60} must be {what}.") from None
    for key in ("prompt", "negative_prompt", "tag"):
        _check_text(getattr(line, key), key, where, limits)
    return line


def _meta_name(key: str, where: str, extra: set[str] | None) -> str:
    """Name under which a column without effect is recorded. Raises UsageError for a refused one."""
    if key.startswith(META):
        return key
    if extra is None:
        hint = registry.suggestion(key[:60], COLUMNS)
        raise UsageError(
            f"{where}: {key!r:.60}: unknown column{hint}; --extra-columns keep records it as "
            f"{META}{key:.60}."
        )
    extra.add(key)
    return f"{META}{key}"


def check_prompt(text: str, where: str) -> str:
    """Return the prompt. Raises UsageError for control characters and over-long text."""
    _check_text(text, "prompt", where, Limits())
    return text


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a prompt file, or of standard input for "-"; warns of settings in other columns.

    Raises UsageError, with file and line, for a file that is missing or not UTF-8, for control
    characters, over-long lines, and a file without prompts.
    """
    prompts, unused = [], dict[str, None]()
    for where, cells, *_ in read_table(path):
        if isinstance(cells, SamplerError):
            raise cells
        unused.update(dict.fromkeys(name for name in cells if name != "prompt"))
        prompts.append(check_prompt(str(cells.get("prompt", "")), where))
    if not prompts:
        raise UsageError(f"{path}: the file has no prompts.")
    if unused:
        columns = ", ".join(f"{name!s:.40}" for name in [*unused][:10])
        warnings.warn(f"{path}: only the prompts are used here, not {columns}", stacklevel=2)
    return prompts


def _check_text(text: str | None, key: str, where: str, limits: Limits) -> None:
    if text is None:
        return
    if len(text) > limits.max_prompt_chars:
        limit = limits.max_prompt_chars
        raise UsageError(
            f"{where}: {key}: the text has more than {limit} characters (limits.max_prompt_chars)."
        )
    if bad := _FORBIDDEN.search(text):
        code = ord(bad[0])
        raise UsageError(f"{where}: {key}: holds the control character U+{code:04X}.")


def _checked(value: Any, key: str, where: str) -> Any:
    """A meta value, which may be any short plain data."""
    try:
        size = len(canonical(value))
    except (TypeError, ValueError, RecursionError):
        size = 0
    if not 0 < size <= 10_000 or any(_FORBIDDEN.search(text) for text in _texts(value)):
        raise UsageError(
            f"{where}: {key:.60}: must be plain data of at most 10,000 characters, without "
            "control characters.",
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
