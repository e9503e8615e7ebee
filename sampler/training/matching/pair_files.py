"""Pairs of images with a preference: a table of prompts and of two image files each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.core.errors import SamplerError, UsageError
from sampler.rewards.base import Prompt
from sampler.runs.lines import check_prompt
from sampler.runs.tables import read_table

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.training.session import Session

COLUMNS = ("prompt", "chosen", "rejected")


def read_pairs(source: str) -> list[str]:
    """Return the prompts of the pairs; their metadata has the names of the two files.

    source: a folder with metadata.jsonl, or a table (csv, tsv, jsonl, parquet), with the columns
    prompt, chosen and rejected; names are relative to the table's folder. Raises UsageError.
    """
    found: list[str] = []
    folder = _folder(source)
    for raw in read_table(folder / "metadata.jsonl" if Path(source).is_dir() else source):
        if isinstance(raw.cells, SamplerError):
            raise raw.cells
        found.append(_pair(raw.cells, raw.where, folder))
    if not found:
        raise UsageError(f"dpo: data = {source} has no pair; give at least one.")
    return found


def _pair(cells: Mapping[str, Any], where: str, folder: Path) -> Prompt:
    given = {key: value for key, value in cells.items() if value is not None}
    if unknown := [key for key in given if key not in COLUMNS]:
        raise UsageError(
            f"{where}: {unknown[0]!r:.60}: a pair has the columns {', '.join(COLUMNS)} alone."
        )
    for key in COLUMNS:
        if not isinstance(given.get(key), str):
            raise UsageError(f"{where}: {key}: a pair needs a text here.")
    files = {key: given[key] for key in ("chosen", "rejected")}
    for key, name in files.items():
        if not (folder / name).is_file():
            raise UsageError(f"{where}: {key}: there is no file {str(folder / name)!r:.200}.")
    return Prompt(check_prompt(given["prompt"], where), files)


def read_pair(session: Session, source: str, prompt: str) -> Tensor:
    """Return the clean latents [2, ...] of the chosen and the rejected image of a pair.

    Raises UsageError for an image of another size than the run's.
    """
    import torch

    from sampler.core.images import read

    height, width = session.size
    found: list[Tensor] = []
    for path in files_of(source, prompt):
        image = read(path)
        if tuple(image.shape[-2:]) != session.size:
            raise UsageError(
                f"dpo: {path} is {image.shape[-1]} x {image.shape[-2]} pixels; this run needs "
                f"{width} x {height}."
            )
        found.append(session.pipeline.latents_of(image).float())
    return torch.cat(found)


def files_of(source: str, prompt: str) -> tuple[Path, Path]:
    """Return the files of the chosen and of the rejected image of a pair."""
    names = getattr(prompt, "metadata", {})
    return _folder(source) / names["chosen"], _folder(source) / names["rejected"]


def _folder(source: str) -> Path:
    return Path(source) if Path(source).is_dir() else Path(source).parent
