"""The prompts of a fine-tuning run, with metadata for rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sampler.config.schema import Limits
from sampler.core.errors import UsageError
from sampler.rewards.base import Prompt
from sampler.runs.lines import COLUMNS, parse_line, scalar
from sampler.runs.tables import RawLine, read_table


def read_prompts(prompts: str | Path | Sequence[str | Mapping[str, Any]]) -> list[str]:
    """Return prompts of a prompt file, or given as texts or as mappings like rows of a file.

    `meta_*` columns become the metadata of a `Prompt`, and prompts that have it keep it. Raises
    UsageError for another column.
    """
    found: list[str] = []
    for raw in _rows(prompts):
        line = parse_line(raw, Limits())
        given = [
            key
            for key in COLUMNS
            if key not in ("prompt", "tag") and getattr(line, key) is not None
        ]
        if given := [*given, *line.fields]:
            raise UsageError(
                f"{raw.where}: {given[0]}: a prompt line of fine-tuning has prompt and meta_* "
                "columns; settings of sampling belong to the section fit."
            )
        metadata = {key.removeprefix("meta_"): value for key, value in line.meta.items()}
        if raw.text:
            metadata = {key: scalar(value) for key, value in metadata.items()}
        found.append(Prompt(line.prompt, metadata) if metadata else line.prompt)
    return found


def _rows(prompts: str | Path | Sequence[Any]) -> Iterator[RawLine]:
    if isinstance(prompts, (str, Path)):
        yield from read_table(prompts)
        return
    for number, row in enumerate(prompts, 1):
        where = f"prompt {number}"
        if not isinstance(row, (str, Mapping)):
            raise UsageError(
                f"{where}: a prompt is a text, or a mapping with 'prompt' and 'meta_*' entries, "
                f"not {type(row).__name__}."
            )
        cells = {"prompt": str(row)} if isinstance(row, str) else dict(row)
        if isinstance(row, Prompt):  # which was read already
            cells |= {f"meta_{key}": value for key, value in row.metadata.items()}
        yield RawLine(where, cells)
