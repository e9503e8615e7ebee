"""Prompts alone, for whoever needs no settings: from any prompt file."""

from __future__ import annotations

from pathlib import Path

from sampler.config.schema import Limits
from sampler.errors import SamplerError, UsageError
from sampler.runs import rows
from sampler.runs.tables import read_table


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a prompt file, or of standard input for "-".

    Raises SamplerError (2) that names the file and the line: a file that is missing, not UTF-8,
    holds control characters or over-long lines, or has no prompt at all.
    """
    prompts = []
    for where, cells in read_table(path):
        if isinstance(cells, SamplerError):
            raise cells
        prompts.append(check_prompt(str(cells.get("prompt", "")), where))
    if not prompts:
        raise UsageError(f"{path}: there is no prompt in it.")
    return prompts


def check_prompt(text: str, where: str) -> str:
    """The prompt as it is. Raises SamplerError (2) for control characters and too long texts."""
    rows.check_prompt(text, where, Limits())
    return text
